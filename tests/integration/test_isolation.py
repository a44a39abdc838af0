"""What an engine can't do to others: the network from inside, bombs, and containers that are less closed."""

import asyncio
import os
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from statistics import quantiles
from typing import Any
from uuid import UUID

import pytest
from docker import APIClient
from docker.errors import NotFound
from structlog.testing import capture_logs

from services.provisioner.backends.base import Backend, EngineSpec, InstanceState
from services.shared.errors import Unavailable
from tests.harness import ROOT
from tests.integration.backend_rigs import DockerRig, answers, free_port, spec_for, until

PRIVATE, LINK_LOCAL, PUBLIC = "10.214.77.2", "169.254.77.7", "203.0.113.77"
# Far less than a bomb lasts.
PROBE_S = 1.0
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="rules of the packet filter take root")


async def running(rig: DockerRig, backend: Backend) -> EngineSpec:
    spec = spec_for(rig)
    await backend.create(spec)
    await backend.start(spec)
    await until(lambda: answers(spec.port))
    return spec


def inside(rig: DockerRig, engine_id: UUID, command: str) -> tuple[int, str]:
    """Runs a shell command with the rights of the engine; returns its exit code and output."""
    execution = rig.api.exec_create(f"engine-{engine_id}", ["/bin/busybox", "sh", "-c", command])
    output = rig.api.exec_start(execution["Id"]).decode().strip()
    return int(rig.api.exec_inspect(execution["Id"])["ExitCode"]), output


def address(rig: DockerRig, engine_id: UUID) -> str:
    shown = rig.api.inspect_container(f"engine-{engine_id}")
    return str(shown["NetworkSettings"]["Networks"][rig.network]["IPAddress"])


def gateway(rig: DockerRig) -> str:
    return str(rig.api.inspect_network(rig.network)["IPAM"]["Config"][0]["Gateway"])


def bridge_of(api: APIClient, network: str) -> str:
    """Its interface on this host."""
    shown = api.inspect_network(network)
    return str(shown["Options"].get("com.docker.network.bridge.name", f"br-{shown['Id'][:12]}"))


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def iptables(*arguments: str) -> str:
    return run("iptables", "--wait", "5", *arguments)


@pytest.fixture
def guard(docker_rig: DockerRig) -> Iterator[None]:
    """Takes back what `isolate` writes."""
    yield
    bridge = bridge_of(docker_rig.api, docker_rig.network)
    for chain, rules in (("DOCKER-USER", f"ENGINES-{bridge}"), ("INPUT", f"ENGINES-{bridge}-IN")):
        for action in (["-D", chain, "-i", bridge, "-j", rules], ["-F", rules], ["-X", rules]):
            with suppress(subprocess.CalledProcessError):
                iptables(*action)


def isolate(rig: DockerRig, *products: str) -> None:
    run(str(ROOT / "deploy" / "docker" / "isolate-engines"), rig.network, *products)


@pytest.fixture
def outside() -> Iterator[int]:
    """The port on which this host listens, and another one, with a private, a link-local and a public address."""
    name, link = f"outside-{os.getpid()}", f"o{os.getpid()}"
    with ExitStack() as stack:
        run("ip", "netns", "add", name)
        stack.callback(run, "ip", "netns", "delete", name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "address", "add", "10.214.77.1/24", "dev", link)
        run("ip", "link", "set", link, "up")
        for one in (f"{PRIVATE}/24", f"{LINK_LOCAL}/32", f"{PUBLIC}/32"):
            run("ip", "-n", name, "address", "add", one, "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        for one in (LINK_LOCAL, PUBLIC):
            run("ip", "route", "add", one, "via", PRIVATE)
        port = free_port()
        for where in (["ip", "netns", "exec", name], []):
            server = subprocess.Popen([*where, "busybox", "nc", "-ll", "-p", str(port), "-e", "/bin/true"])
            stack.callback(server.wait)
            stack.callback(server.kill)
        yield port


@needs_root
async def test_an_engine_reaches_the_internet_and_nothing_nearer(
    docker_rig: DockerRig, outside: int, guard: None
) -> None:
    backend = await docker_rig.backend()
    engine, neighbour = await running(docker_rig, backend), await running(docker_rig, backend)
    targets = {
        "neighbour": f"{address(docker_rig, neighbour.engine_id)} 8000",
        "neighbour by name": f"engine-{neighbour.engine_id} 8000",
        "neighbour's published port": f"{gateway(docker_rig)} {neighbour.port}",
        "a database on this host": f"{gateway(docker_rig)} {outside}",
        "a database on this host's other address": f"10.214.77.1 {outside}",
        "a private network": f"{PRIVATE} {outside}",
        "link-local, as metadata services are": f"{LINK_LOCAL} {outside}",
        "the internet": f"{PUBLIC} {outside}",
    }

    async def reached() -> set[str]:
        async def reaches(target: str) -> bool:
            command = f"busybox timeout 3 busybox nc -w 2 {target} </dev/null"
            return (await asyncio.to_thread(inside, docker_rig, engine.engine_id, command))[0] == 0

        found = await asyncio.gather(*map(reaches, targets.values()))
        return {name for name, reaches in zip(targets, found, strict=True) if reaches}

    before = await reached()
    assert not before & {"neighbour", "neighbour by name"}
    # What the rules are for: without them all this is open.
    assert before >= {"a database on this host", "a private network", "link-local, as metadata services are"}
    isolate(docker_rig)
    assert await reached() == {"the internet"}
    assert inside(docker_rig, engine.engine_id, "test -e /var/run/docker.sock")[0] != 0
    assert await answers(engine.port), "this host reaches it as before"
    isolate(docker_rig)
    assert await reached() == {"the internet"}, "once more changes nothing"


@needs_root
async def test_products_on_the_engines_network_reach_them_if_they_are_let(docker_rig: DockerRig, guard: None) -> None:
    run("docker", "network", "create", "--opt", "com.docker.network.bridge.enable_icc=false",
        "--subnet", "10.215.77.0/24", "--ip-range", "10.215.77.128/25", docker_rig.network)  # fmt: skip
    backend = await docker_rig.backend()
    engine, other = await running(docker_rig, backend), await running(docker_rig, backend)
    product = docker_rig.api.create_container(
        docker_rig.engine,
        labels={"september.installation": docker_rig.installation},
        host_config=docker_rig.api.create_host_config(network_mode=docker_rig.network),
        networking_config={
            "EndpointsConfig": {docker_rig.network: docker_rig.api.create_endpoint_config(ipv4_address="10.215.77.5")}
        },
    )["Id"]
    docker_rig.api.start(product)

    def reaches(container: str, engine: EngineSpec) -> bool:
        command = f"busybox timeout 3 busybox wget -qO- http://engine-{engine.engine_id}:8000/health"
        execution = docker_rig.api.exec_create(container, ["/bin/busybox", "sh", "-c", command])
        return bool(docker_rig.api.exec_start(execution["Id"]) == b'{"status":"ok"}')

    isolate(docker_rig)
    assert not reaches(product, engine)
    isolate(docker_rig, "10.215.77.0/25")
    assert reaches(product, engine)
    assert not reaches(f"engine-{other.engine_id}", engine)


async def test_what_is_open_on_the_network_is_told(docker_rig: DockerRig, guard: None) -> None:
    docker_rig.api.create_network(docker_rig.network, driver="bridge")
    with capture_logs() as logs:
        await docker_rig.backend()
    faults = [entry["fault"] for entry in logs if entry["event"] == "engine_network_open"]
    assert any("reach each other" in fault for fault in faults)
    assert any("this host" in fault for fault in faults)
    if os.geteuid() == 0:
        isolate(docker_rig)
        with capture_logs() as logs:
            await docker_rig.backend()
        (fault,) = [entry["fault"] for entry in logs if entry["event"] == "engine_network_open"]
        assert "reach each other" in fault


async def test_an_open_network_of_an_earlier_version_is_made_anew_once_nobody_uses_it(docker_rig: DockerRig) -> None:
    api, labels = docker_rig.api, {"september.installation": docker_rig.installation}
    api.create_network(docker_rig.network, driver="bridge", labels=labels)
    before = api.inspect_network(docker_rig.network)["Id"]
    backend = await docker_rig.backend()
    network = api.inspect_network(docker_rig.network)
    assert network["Id"] != before
    assert network["Options"]["com.docker.network.bridge.enable_icc"] == "false"

    spec = await running(docker_rig, backend)
    await docker_rig.backend()
    assert api.inspect_network(docker_rig.network)["Id"] == network["Id"]

    await backend.stop(spec.engine_id, grace_s=10)
    api.remove_network(docker_rig.network)
    api.create_network(docker_rig.network, driver="bridge", labels=labels)
    await docker_rig.backend()
    with pytest.raises(Unavailable):  # It was on the old one, and is removed with its volume kept.
        await backend.start(spec)
    assert docker_rig.volume(spec.engine_id)
    await backend.create(spec)
    await backend.start(spec)
    await until(lambda: answers(spec.port))


LESS_CLOSED: dict[str, dict[str, Any]] = {
    "privileged": {"privileged": True},
    "a capability": {"cap_add": ["NET_ADMIN"]},
    "new privileges": {"security_opt": []},
    "no seccomp": {"security_opt": ["no-new-privileges:true", "seccomp=unconfined"]},
    "the host's processes": {"pid_mode": "host"},
    "the docker socket": {"binds": ["/var/run/docker.sock:/var/run/docker.sock"]},
    "a device": {"devices": ["/dev/null:/dev/x:rwm"]},
    "a root that can be written": {"read_only": False},
    "swap": {"memswap_limit": -1},
    "no limit of processes": {"pids_limit": -1},
    "a port for the world": {"port_bindings": {8000: ("0.0.0.0", 0)}},
    "another log": {"log_config": {"Type": "json-file", "Config": {}}},
    "a shared memory": {"ipc_mode": "shareable"},
}


async def test_an_engine_that_is_less_closed_is_made_anew_before_it_is_started(
    docker_rig: DockerRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await docker_rig.backend()
    make = docker_rig.api.create_host_config
    for what, difference in LESS_CLOSED.items():
        spec = spec_for(docker_rig)
        with monkeypatch.context() as earlier:
            earlier.setattr("docker.APIClient.create_host_config", lambda _, **o: make(**{**o, **difference}))  # noqa: B023
            await backend.create(spec)
        less = docker_rig.api.inspect_container(f"engine-{spec.engine_id}")["Id"]
        await backend.create(spec)
        closed = docker_rig.api.inspect_container(f"engine-{spec.engine_id}")["Id"]
        assert closed != less, what
        await backend.create(spec)
        assert docker_rig.api.inspect_container(f"engine-{spec.engine_id}")["Id"] == closed, what
        with pytest.raises(NotFound):
            docker_rig.api.inspect_container(less)
        await backend.remove(spec.engine_id, volume=True)


async def test_one_as_closed_as_it_has_to_be_is_started_again_as_it_is(docker_rig: DockerRig) -> None:
    backend = await docker_rig.backend()
    spec = await running(docker_rig, backend)
    before = docker_rig.api.inspect_container(f"engine-{spec.engine_id}")["Id"]
    await backend.stop(spec.engine_id, grace_s=10)
    await backend.create(spec)
    await backend.start(spec)
    assert docker_rig.api.inspect_container(f"engine-{spec.engine_id}")["Id"] == before


# A shell that can't fork ends; the next one takes its place without.
BOMBS = {
    "fork": "bomb() { bomb | bomb & }; bomb",
    "memory": "busybox dd if=/dev/zero of=/dev/shm/full bs=1M count=60; busybox tail /dev/zero",
    "disk": "busybox dd if=/dev/zero of=/tmp/full bs=1M",
    "files": "busybox dd if=/dev/zero of=/full",
}
REPEATED = """export BOMB='trap "exec busybox sh -c \\"\\$BOMB\\"" EXIT; {bomb}'
busybox timeout -s KILL {seconds} busybox sh -c "$BOMB" >/dev/null 2>&1"""


async def probes(port: int, meanwhile: Awaitable[object]) -> list[float]:
    """How long probes of an engine take, 50 a second, until something has ended; none as long as a bomb."""

    async def probe() -> float:
        begun = time.monotonic()
        async with asyncio.timeout(PROBE_S):
            assert await answers(port)
        return time.monotonic() - begun

    begun, end = time.monotonic(), asyncio.ensure_future(meanwhile)
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(probe()), group.create_task(probe())]
        while not end.done():
            await asyncio.sleep(begun + len(running) / 50 - time.monotonic())
            running.append(group.create_task(probe()))
    return [task.result() for task in running]


async def test_a_bomb_harms_its_own_engine_alone(docker_rig: DockerRig, extent: Callable[[int, int], int]) -> None:
    backend = await docker_rig.backend(memory_bytes=64 * 1024 * 1024, cpus=0.5, pids=64)
    neighbour = await running(docker_rig, backend)
    bomb_s = extent(2, 10)
    for name, bomb in BOMBS.items():
        engine = await running(docker_rig, backend)
        before = await probes(neighbour.port, asyncio.sleep(extent(0, bomb_s)))
        command = REPEATED.format(bomb=bomb, seconds=bomb_s)
        during = await probes(neighbour.port, asyncio.to_thread(inside, docker_rig, engine.engine_id, command))
        assert len(during) > 50, f"{name} is over too soon"
        p99_ms = [quantiles(took, n=100, method="inclusive")[98] * 1000 for took in (before, during)]
        print(f"{name}: p99 {p99_ms[0]:.1f} ms before, {p99_ms[1]:.1f} ms meanwhile, {len(during)} probes")
        await backend.remove(engine.engine_id, volume=True)
        instance = await backend.inspect(neighbour.engine_id)
        assert instance is not None, name
        assert instance.state is InstanceState.RUNNING, name
