"""The platform with real containers: what the process backend is tested for, and the hardening."""

import asyncio
import json
import os
import random
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import grpc
import pytest
from docker import APIClient
from docker.errors import ImageNotFound

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from services.provisioner.backends.base import EngineSpec
from services.provisioner.backends.engine_template import INSTALLATION_LABEL, EngineTemplate, volume_name
from services.provisioner.backends.hardening import deviations
from tests.canaries import Canaries
from tests.harness import ROOT, Clients, Platform, Product, eventually, reason
from tests.integration.docker_daemon import docker_api, remove_all
from tests.integration.test_isolation import bridge_of, iptables, needs_root
from tests.integration.test_life_cycle import User

__all__ = ["docker_api"]

Connect = Callable[..., Clients]
IMAGE = "september-engine:dev"
# A name of its own for every run: several may share the daemon.
SILENT = f"september-test-silent-{uuid4().hex[:12]}:dev"


class DockerPlatform(Platform):
    """An installation whose engines are containers."""

    api: APIClient

    def filters(self) -> dict[str, str]:
        return {"label": f"{INSTALLATION_LABEL}={self.installation()}"}

    def counts(self) -> dict[str, int]:
        """The oracle; walks all engines, too, to see that they are as closed as they have to be."""
        containers = self.api.containers(all=True, filters=self.filters())
        network = self.environment.get("ORCH_ENGINE_NETWORK", "engine_net")
        template = EngineTemplate(self.installation(), network, None, 512 * 2**20, 1.0, 256)
        for engine_id, port in self.query("SELECT engine_id, port FROM port_leases"):
            options = template.options(self.api, EngineSpec(engine_id, 1, IMAGE, port, environment={}))
            for container in containers:
                if container["Names"] == [f"/engine-{engine_id}"]:
                    assert deviations(self.api.inspect_container(container["Id"]), options) == []
        return {
            "rows": self.query("SELECT count(*) FROM engines")[0][0],
            "ports": self.query("SELECT count(*) FROM port_leases")[0][0],
            "containers": len(containers),
            "volumes": len(self.api.volumes(filters=self.filters())["Volumes"] or []),
        }

    @cached_property
    def volumes(self) -> Path:
        """Where Docker keeps them."""
        return Path(self.api.info()["DockerRootDir"]) / "volumes"

    def volume(self, engine_id: UUID) -> Path:
        return self.volumes / volume_name(engine_id) / "_data"


NOTHING = {"rows": 0, "ports": 0, "containers": 0, "volumes": 0}


@pytest.fixture(scope="session")
def images(docker_api: APIClient) -> Iterator[None]:
    """The reference engine's image, and one that runs and never answers."""
    subprocess.run([ROOT / "deploy" / "docker" / "make-engine-image", IMAGE], check=True, capture_output=True)
    command = json.dumps(["python3", "-c", "import signal; signal.sigwait([signal.SIGTERM])"])
    build = ["docker", "build", "-t", SILENT, "-"]
    dockerfile = f"FROM {IMAGE}\nENTRYPOINT []\nCMD {command}\n"
    subprocess.run(build, input=dockerfile.encode(), check=True, capture_output=True)
    yield
    # Every module that has this fixture has one of its own, and a worker may run several.
    with suppress(ImageNotFound):
        docker_api.remove_image(SILENT, force=True)


@pytest.fixture
def platform(database_url: str, tmp_path: Path, docker_api: APIClient, images: None) -> Iterator[DockerPlatform]:
    platform = DockerPlatform(
        database_url,
        tmp_path,
        ORCH_ENGINE_BACKEND="docker",
        ORCH_ENGINE_IMAGE=IMAGE,
        ORCH_PORT_MIN="23000",
        ORCH_PORT_MAX="23999",
        ORCH_ENGINE_ENV_PASSTHROUGH="CANARY",
        CANARY="passed-through",
    )
    platform.api = docker_api
    try:
        yield platform
    finally:
        platform.close()
        with suppress(Exception):
            remove_all(docker_api, platform.installation())


def provision(
    clients: Clients, product: Product, user_id: str = "u1", image: str = ""
) -> "grpc.aio.UnaryUnaryCall[pb.ProvisionEngineRequest, pb.ProvisionEngineResponse]":
    return clients.provisioner.ProvisionEngine(
        pb.ProvisionEngineRequest(user_id=user_id, engine_version=image), metadata=product.metadata
    )


async def execute(url: str, key: str) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/execute", json={"message": "hello"}, headers={"X-Engine-Key": key}) as answer,
    ):
        await answer.read()
        return answer.status


async def test_a_life_in_a_hardened_container(platform: DockerPlatform, connect: Connect) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    product = await clients.register()
    request = admission_pb.AdmitRequest(user_id="u1", auto_provision=True)
    answers = await asyncio.gather(*(clients.admission.Admit(request, metadata=product.metadata) for _ in range(50)))
    engine = answers[0].engine
    assert all(answer.engine == engine for answer in answers)
    assert platform.counts() == {"rows": 1, "ports": 1, "containers": 1, "volumes": 1}
    assert await execute(engine.url, engine.api_key) == 200
    assert await execute(engine.url, "sk-sept-other") == 401

    inspected: dict[str, Any] = platform.api.inspect_container(f"engine-{engine.engine_id}")
    host = inspected["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert "no-new-privileges" in " ".join(host["SecurityOpt"])
    assert host["ReadonlyRootfs"] is True
    assert host["Privileged"] is False
    assert host["PidsLimit"] > 0
    assert 0 < host["Memory"] == host["MemorySwap"]
    assert host["NanoCpus"] > 0
    assert "/tmp" in host["Tmpfs"]
    assert host["LogConfig"]["Type"] == "local"
    assert host["LogConfig"]["Config"]["max-size"]
    assert inspected["Config"]["User"] not in ("", "0", "root")
    bindings = [b for ports in inspected["NetworkSettings"]["Ports"].values() for b in ports or []]
    assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}
    assert "CANARY=passed-through" in inspected["Config"]["Env"]
    shown = json.dumps(inspected)
    for secret in (engine.api_key, product.key, platform.admin_key, platform.environment["ORCH_MASTER_KEY"]):
        assert secret not in shown

    await clients.provisioner.DestroyEngine(pb.DestroyEngineRequest(user_id="u1"), metadata=product.metadata)
    assert platform.counts() == NOTHING


async def test_whenever_clients_cancel_every_user_has_one_engine(
    platform: DockerPlatform, connect: Connect, seed: int, extent: Callable[[int, int], int]
) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    product = await clients.register()
    chance = random.Random(seed)
    cancelled = 0

    async def live(user_id: str) -> None:
        nonlocal cancelled
        request = admission_pb.AdmitRequest(user_id=user_id, auto_provision=True)
        call = clients.admission.Admit(request, metadata=product.metadata)
        await asyncio.wait([asyncio.ensure_future(call)], timeout=chance.uniform(0.001, 0.5))
        cancelled += call.cancel()
        engine = (await clients.admission.Admit(request, metadata=product.metadata)).engine
        assert await execute(engine.url, engine.api_key) == 200

    users = [f"u{n}" for n in range(extent(4, 60))]
    for four in (users[n : n + 4] for n in range(0, len(users), 4)):
        await asyncio.gather(*map(live, four))
    assert cancelled
    await asyncio.to_thread(eventually, lambda: platform.open_operations() == 0, "every operation has ended")
    assert platform.query("SELECT count(*) FROM operations") == [(len(users),)]
    assert set(platform.counts().values()) == {len(users)}


METADATA = "169.254.169.254"


@contextmanager
def packets_to(address: str) -> Iterator[Callable[[], int]]:
    """Tells within the block how many packets to the address have been sent by this host or passed on by it."""
    chain = f"COUNTS-{uuid4().hex[:12]}"

    def packets() -> int:
        return int(iptables("-nvxL", chain).splitlines()[2].split()[0])

    with ExitStack() as stack:
        iptables("-N", chain)
        stack.callback(iptables, "-X", chain)
        iptables("-A", chain, "-d", address)
        stack.callback(iptables, "-F", chain)
        for way in ("OUTPUT", "FORWARD"):
            iptables("-I", way, "-j", chain)
            stack.callback(iptables, "-D", way, "-j", chain)
        yield packets


@pytest.mark.skipif(os.geteuid() != 0, reason="rules of the packet filter take root")
async def test_an_image_at_a_metadata_service_is_refused_and_no_packet_leaves(
    platform: DockerPlatform, connect: Connect
) -> None:
    clients = connect(platform, platform.provisioner())
    product = await clients.register(allowed_images=["*"])
    engine = f"engine-{(await provision(clients, product)).engine_id}"
    with packets_to(METADATA) as packets:
        for image in (f"{METADATA}/x", f"{METADATA}:80/latest/meta-data:x"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await provision(clients, product, "u2", image)
            assert reason(refused.value) == "BACKEND_ERROR"
        assert packets() == 0
        # What is counted, of this host and of an engine.
        with socket.socket(type=socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", (METADATA, 80))
        assert packets() == 1
        call = f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('{METADATA}', 80))"
        execution = platform.api.exec_create(engine, ["python3", "-c", call])
        assert platform.api.exec_start(execution["Id"]) == b""
        assert packets() == 2


async def test_the_pool_hands_out_no_container_that_is_dead_paused_or_of_an_old_image(
    platform: DockerPlatform, connect: Connect
) -> None:
    image = f"september-test-pool-{uuid4().hex[:12]}:dev"
    platform.api.tag(IMAGE, image)
    settings = {"ORCH_WARM_POOL_SIZE": "2", "ORCH_ENGINE_IMAGE": image}

    def ready() -> set[str]:
        rows = platform.query("SELECT engine_id FROM engines WHERE product_id IS NULL AND status = 'running'")
        return {str(engine_id) for (engine_id,) in rows}

    async def filled() -> list[str]:
        await asyncio.to_thread(
            eventually, lambda: len(ready()) == 2 and not platform.open_operations(), "it is filled"
        )
        return sorted(ready())

    try:
        clients = connect(platform, platform.provisioner(**settings))
        product = await clients.register()
        dead, paused = await filled()
        platform.api.kill(f"engine-{dead}")
        platform.api.pause(f"engine-{paused}")
        made = await provision(clients, product, "u1")
        assert made.engine_id not in (dead, paused)
        assert await execute(made.url, made.api_key) == 200

        members = await filled()
        made = await provision(clients, product, "u2")
        assert made.engine_id in members
        assert await execute(made.url, made.api_key) == 200

        old = await filled()
        platform.api.tag(SILENT, image)
        await asyncio.to_thread(eventually, lambda: not ready() & set(old), "members of the old image are gone")
    finally:
        platform.api.remove_image(image, force=True)


async def test_what_docker_shows_of_an_engine_holds_no_secret(platform: DockerPlatform, connect: Connect) -> None:
    clients = connect(platform, platform.provisioner())
    product = await clients.register()
    made = await provision(clients, product)
    rotate = pb.RotateEngineKeyRequest(user_id="u1")
    rotated = await clients.provisioner.RotateEngineKey(rotate, metadata=product.metadata)
    assert await execute(made.url, rotated.api_key) == 200
    assert await execute(made.url, product.key) == 401

    canaries = Canaries(
        first_key=made.api_key,
        second_key=rotated.api_key,
        platform_key=product.key,
        admin_key=platform.admin_key,
        master_key=platform.environment["ORCH_MASTER_KEY"],
        registry=platform.database_url,
    )
    name, api = f"engine-{made.engine_id}", platform.api
    shown = [api.inspect_container(name), api.top(name), api.volumes(filters=platform.filters())]
    look = api.exec_create(name, ["python3", "-c", "print(open('/proc/1/environ').read())"])
    data, _ = api.get_archive(name, "/data")
    texts = [json.dumps(shown).encode(), api.exec_start(look["Id"]), b"".join(data), api.logs(name)]
    for text, word in zip(texts, (b"ENGINE_KEY_HASH", b"ENGINE_KEY_HASH", b"brain.sqlite", b'"event"'), strict=True):
        assert word in text
        assert canaries.found(text) == set()


async def test_ten_engines_for_forty_users_on_a_quota_of_ten(platform: DockerPlatform, connect: Connect) -> None:
    clients = connect(platform, platform.provisioner())
    product = await clients.register(max_engines=10)

    async def outcome(index: int) -> str:
        try:
            await provision(clients, product, f"u{index}")
        except grpc.aio.AioRpcError as error:
            return reason(error)
        return "made"

    outcomes = Counter(await asyncio.gather(*(outcome(i) for i in range(40))))
    assert outcomes == {"made": 10, "QUOTA_EXCEEDED": 30}
    assert set(platform.counts().values()) == {10}


async def test_full_ports_bad_images_and_silent_engines_leave_nothing_behind(
    platform: DockerPlatform, connect: Connect
) -> None:
    ports = {"ORCH_PORT_MIN": "24000", "ORCH_PORT_MAX": "24002"}
    clients = connect(platform, platform.provisioner(ORCH_BOOT_TIMEOUT_S="3", **ports))
    product = await clients.register(allowed_images=["september-*"])
    for image, code in (("september-engine:missing", "BACKEND_ERROR"), (SILENT, "BOOT_TIMEOUT")):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await provision(clients, product, image=image)
        assert reason(error.value) == code
        assert platform.counts() == NOTHING
    for index in range(3):
        await provision(clients, product, f"u{index}")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await provision(clients, product, "u3")
    assert reason(error.value) == "PORT_EXHAUSTION"
    await clients.provisioner.DestroyEngine(pb.DestroyEngineRequest(user_id="u0"), metadata=product.metadata)
    await provision(clients, product, "u3")
    assert set(platform.counts().values()) == {3}


@pytest.mark.parametrize("step", ["creating", "starting", "probing"])
async def test_a_provisioner_killed_in_the_middle_of_a_boot_is_finished_by_the_next(
    platform: DockerPlatform, connect: Connect, step: str
) -> None:
    lease = {"ORCH_OPERATION_LEASE_S": "1"}
    first = platform.provisioner(**lease)
    clients = connect(platform, first)
    product = await clients.register()
    task = asyncio.ensure_future(provision(clients, product))
    await asyncio.to_thread(
        eventually,
        lambda: platform.query("SELECT 1 FROM operations WHERE step = %s OR finished_at IS NOT NULL", step),
        f"the boot is {step}",
    )
    first.kill()
    with suppress(grpc.aio.AioRpcError):
        await task
    second = platform.provisioner(**lease)
    await asyncio.to_thread(eventually, lambda: platform.open_operations() == 0, "the boot has ended")
    assert platform.query("SELECT status FROM engines") == [("running",)]
    assert set(platform.counts().values()) == {1}
    clients = connect(platform, second)
    await clients.provisioner.DestroyEngine(pb.DestroyEngineRequest(user_id="u1"), metadata=product.metadata)
    assert platform.counts() == NOTHING


async def test_a_stopped_platform_finds_its_containers_again(platform: DockerPlatform, connect: Connect) -> None:
    first = platform.provisioner(ORCH_STOP_ENGINES_ON_EXIT="true")
    clients = connect(platform, first)
    product = await clients.register()
    made = await provision(clients, product)
    assert first.terminate() == 0
    assert platform.api.containers(filters=platform.filters()) == []

    second = platform.provisioner()
    clients = connect(platform, second, platform.admission(second))
    answer = await clients.admission.Admit(admission_pb.AdmitRequest(user_id="u1"), metadata=product.metadata)
    assert (answer.engine.engine_id, answer.engine.api_key) == (made.engine_id, made.api_key)
    assert await execute(answer.engine.url, answer.engine.api_key) == 200
    assert set(platform.counts().values()) == {1}


async def test_an_engine_is_always_made_of_the_image_that_it_was_made_of_first(
    platform: DockerPlatform, connect: Connect
) -> None:
    clients = connect(platform, platform.provisioner())
    name = f"september-test-pinned-{uuid4().hex[:12]}"
    platform.api.tag(IMAGE, name)
    product = await clients.register(allowed_images=[name])
    try:
        container = f"engine-{(await provision(clients, product, image=name)).engine_id}"
        first = platform.api.inspect_container(container)["Image"]
        build = ["docker", "build", "-t", name, "-"]
        dockerfile = f"FROM {IMAGE}\nLABEL new=1\n".encode()
        await asyncio.to_thread(subprocess.run, build, input=dockerfile, check=True, capture_output=True)

        async def made_anew() -> str:
            await clients.provisioner.StopEngine(pb.StopEngineRequest(user_id="u1"), metadata=product.metadata)
            platform.api.remove_container(container)
            await clients.provisioner.StartEngine(pb.StartEngineRequest(user_id="u1"), metadata=product.metadata)
            return str(platform.api.inspect_container(container)["Image"])

        assert await made_anew() == first
        platform.query("UPDATE engines SET image_id = NULL")
        later = platform.api.inspect_image(name)["Id"]  # type: ignore[no-untyped-call]
        assert await made_anew() == later != first
    finally:
        await clients.provisioner.DestroyEngine(pb.DestroyEngineRequest(user_id="u1"), metadata=product.metadata)
        platform.api.remove_image(name)


@pytest.fixture
def network(platform: DockerPlatform) -> Iterator[str]:
    """The name of a network that only this test's engines are in."""
    name = f"september-test-{uuid4().hex}"
    platform.environment["ORCH_ENGINE_NETWORK"] = name
    yield name
    platform.close()
    remove_all(platform.api, platform.installation())
    platform.api.remove_network(name)


@needs_root
async def test_engines_that_the_prober_is_cut_off_from_are_left_alone(
    platform: DockerPlatform, network: str, connect: Connect
) -> None:
    provisioner = platform.provisioner(
        ORCH_HEALTH_CHECK_INTERVAL_S="1", ORCH_HEALTH_CHECK_TIMEOUT_S="0.5", ORCH_RECONCILE_INTERVAL_S="3600"
    )
    clients = connect(platform, provisioner)
    product = await clients.register()
    made = await asyncio.gather(*(provision(clients, product, f"u{n}") for n in range(4)))

    def instances() -> list[tuple[str, str]]:
        shown = [platform.api.inspect_container(f"engine-{engine.engine_id}") for engine in made]
        return [(one["Id"], one["State"]["StartedAt"]) for one in shown]

    def is_ill() -> bool:
        return [event["event"] for event in provisioner.events()].count("prober_ill") > 4

    before = instances()
    rule = ["INPUT", "--in-interface", bridge_of(platform.api, network), "--jump", "DROP"]
    iptables("--insert", *rule)
    try:
        await asyncio.to_thread(eventually, is_ill, "the prober is ill for longer than it may be")
        assert platform.query("SELECT DISTINCT status FROM engines") == [("running",)]
    finally:
        iptables("--delete", *rule)
    [(moment,)] = platform.query("SELECT clock_timestamp()")
    well = "SELECT FROM engines WHERE status = 'running' AND last_health_at > %s HAVING count(*) = 4"
    await asyncio.to_thread(eventually, lambda: platform.query(well, moment), "all are well")
    assert instances() == before
    assert platform.query("SELECT DISTINCT action FROM audit_events WHERE engine_id IS NOT NULL") == [("provision",)]


@needs_root
async def test_a_container_that_docker_can_not_freeze_is_said_to_run(
    platform: DockerPlatform, connect: Connect
) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    user = User(clients, await clients.register())
    made = await user.call("Provision")

    async def refusal() -> str | None:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await user.call("Sleep")
        assert reason(refused.value) == "UNAVAILABLE"
        return refused.value.details()

    with kept_thawed(platform.api, f"engine-{made.engine_id}"):
        async with asyncio.timeout(20):
            # At first it is awake for other reasons.
            while await refusal() != "the engine stays awake: it could not be frozen":
                pass
        assert platform.query("SELECT status, busy_reason FROM engines") == [
            ("running", "the engine stays awake: it could not be frozen")
        ]
        engine = (await user.admit()).engine
        assert await execute(engine.url, engine.api_key) == 200
    event = [event for event in provisioner.events() if event["event"] == "backend_refused"][-1]
    assert (event["call"], event["engine_id"]) == ("freeze", made.engine_id)
    assert "pause failed" in event["reason"]
    await user.sleep()
    assert platform.api.inspect_container(f"engine-{made.engine_id}")["State"]["Paused"]
    assert await execute(engine.url, (await user.admit(auto_wake=True)).engine.api_key) == 200


@contextmanager
def kept_thawed(api: APIClient, container: str) -> Iterator[None]:
    """Within the block the host can't freeze the container: the file to write that to is read-only."""
    pid = api.inspect_container(container)["State"]["Pid"]
    groups = dict(line.split(":", 2)[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    if "freezer" in groups:
        file = Path("/sys/fs/cgroup/freezer", groups["freezer"].lstrip("/"), "freezer.state")
    else:
        file = Path("/sys/fs/cgroup", groups[""].lstrip("/"), "cgroup.freeze")
    subprocess.run(["mount", "--bind", file, file], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", file], check=True)
        yield
    finally:
        subprocess.run(["umount", file], check=True)
