"""What only the Docker backend has to show: hardened containers, and a daemon that may hang or be away."""

import asyncio
import hashlib
import json
import os
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest
from structlog.testing import capture_logs

from services.provisioner.backends.base import Backend, EngineSpec, Instance, InstanceState
from services.provisioner.backends.docker import DockerBackend
from services.shared.errors import BackendError, Unavailable
from tests.integration.backend_rigs import DockerRig, answers, free_port, spec_for, until

TIMEOUT_S = 3.0
AT_ONCE_S = 1.5  # On a busy machine.
DAEMON = "/var/run/docker.sock"


class Proxy:
    """Stands before the real daemon, and can be told to fall silent."""

    def __init__(self, socket_path: str) -> None:
        self.url = f"unix://{socket_path}"
        self.requests = b""
        self.silent = False
        self.closes = False
        self.swallows: bytes | None = None
        """Answers to requests with this in their head are lost; the daemon gets and obeys them."""
        self._open: set[socket.socket] = set()
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                proxy._serve(self.request)

        self._server = socketserver.ThreadingUnixStreamServer(socket_path, Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()

    def close(self) -> None:
        self._server.shutdown()
        for connection in self._open.copy():
            _cut(connection)
        self._server.server_close()

    def _serve(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as daemon:
            daemon.connect(DAEMON)
            self._open |= {client, daemon}
            lost = threading.Event()
            answers = threading.Thread(target=self._forward_answers, args=(daemon, client, lost))
            answers.start()
            with suppress(OSError):
                while (data := client.recv(65536)) and not self.closes:
                    self.requests += data
                    if not self.silent:
                        if self.swallows is not None and self.swallows in data:
                            lost.set()
                        daemon.sendall(data)
            self._open -= {client, daemon}
            _cut(daemon)
            answers.join()

    def _forward_answers(self, daemon: socket.socket, client: socket.socket, lost: threading.Event) -> None:
        while data := daemon.recv(65536):
            if not lost.is_set() and not self.silent:
                with suppress(OSError):
                    client.sendall(data)


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with tempfile.TemporaryDirectory() as directory:
        proxy = Proxy(f"{directory}/docker.sock")
        yield proxy
        proxy.close()


@pytest.fixture
def catalog() -> Iterator[Path]:
    """Readable by the engines' user, as `tmp_path` is not."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        path.chmod(0o755)
        (path / "catalog.json").write_text("[]")
        yield path


async def running(rig: DockerRig, backend: Backend, **fields: object) -> EngineSpec:
    spec = spec_for(rig, **fields)
    await backend.create(spec)
    await backend.start(spec)
    await until(lambda: answers(spec.port))
    return spec


def run_inside(rig: DockerRig, engine_id: UUID, command: str) -> str:
    """Output of a shell command in the container, with the rights of the engine; `!` is added if it fails."""
    execution = rig.api.exec_create(f"engine-{engine_id}", ["/bin/busybox", "sh", "-c", command])
    output = rig.api.exec_start(execution["Id"]).decode().strip()
    return output + ("!" if rig.api.exec_inspect(execution["Id"])["ExitCode"] else "")


async def test_every_hardening_flag_is_set_and_no_secret_can_be_read(
    docker_rig: DockerRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = f"sk-sept-{uuid4().hex}"
    (tmp_path / "config.json").write_text(json.dumps({"proxies": {"default": {"httpProxy": f"http://u:{canary}@p"}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("ORCH_MASTER_KEY", canary)
    backend = await docker_rig.backend(catalog_mount=tmp_path)
    key_hash = hashlib.sha256(canary.encode()).hexdigest()
    spec = await running(docker_rig, backend, environment={"ENGINE_KEY_HASH": key_hash})

    name = f"engine-{spec.engine_id}"
    container = docker_rig.api.inspect_container(name)
    assert canary not in json.dumps(container)
    config, host = container["Config"], container["HostConfig"]
    assert config["User"] == "10001:10001"
    assert config["Hostname"] == name
    assert config["Healthcheck"] == {"Test": ["NONE"]}
    assert sorted(variable for variable in config["Env"] if not variable.startswith("PATH=")) == [
        "CATALOG_DIR=/catalog",
        f"ENGINE_KEY_HASH={key_hash}",
        "SQLITE_DB_PATH=/data/brain.sqlite",
    ]
    assert config["Labels"] == {
        "september.installation": docker_rig.installation,
        "september.engine_id": str(spec.engine_id),
        "september.generation": "1",
    }
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Privileged"] is False
    assert host["ReadonlyRootfs"] is True
    assert host["Tmpfs"] == {"/tmp": "size=64m,noexec,nosuid,nodev"}
    assert host["Memory"] == host["MemorySwap"] == 512 * 1024 * 1024
    assert host["NanoCpus"] == 1_000_000_000
    assert {"Name": "core", "Soft": 0, "Hard": 0} in host["Ulimits"]
    assert {"Name": "nofile", "Soft": 16384, "Hard": 16384} in host["Ulimits"]
    assert host["PidsLimit"] == 256
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["Init"] is False
    assert not host["OomKillDisable"]
    assert host["LogConfig"] == {"Type": "local", "Config": {"max-size": "10m", "max-file": "3"}}
    assert host["PortBindings"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(spec.port)}]}
    assert host["Binds"] is None
    assert host["PidMode"] == host["UTSMode"] == host["UsernsMode"] == ""
    assert host["IpcMode"] == "private"
    assert not host["Devices"]
    assert list(container["NetworkSettings"]["Networks"]) == [docker_rig.network]
    assert name in container["NetworkSettings"]["Networks"][docker_rig.network]["Aliases"]
    volume = docker_rig.api.inspect_volume(f"engine-data-{spec.engine_id}")
    assert volume["Labels"] == {
        "september.installation": docker_rig.installation,
        "september.engine_id": str(spec.engine_id),
    }


async def test_sizes_are_the_operators(docker_rig: DockerRig) -> None:
    backend = await docker_rig.backend(memory_bytes=64 * 1024 * 1024, cpus=0.5, pids=32)
    spec = await running(docker_rig, backend)

    host = docker_rig.api.inspect_container(f"engine-{spec.engine_id}")["HostConfig"]
    assert host["Memory"] == host["MemorySwap"] == 64 * 1024 * 1024
    assert host["NanoCpus"] == 500_000_000
    assert host["PidsLimit"] == 32


async def test_an_engine_writes_its_volume_and_nothing_that_stays(docker_rig: DockerRig, catalog: Path) -> None:
    backend = await docker_rig.backend(catalog_mount=catalog)
    spec = await running(docker_rig, backend)

    def inside(command: str) -> str:
        return run_inside(docker_rig, spec.engine_id, command)

    assert inside("busybox id -u; busybox id -g") == "10001\n10001"
    assert inside("echo memories > /data/brain.sqlite && busybox cat /data/brain.sqlite") == "memories"
    assert inside("busybox cat /catalog/catalog.json") == "[]"
    assert inside("echo x > /catalog/catalog.json").endswith("!")
    assert inside("echo x > /www/health").endswith("!")
    assert inside("echo x > /etc/x").endswith("!")
    assert inside("busybox cp /bin/busybox /tmp/tool && /tmp/tool true").endswith("!")
    assert inside("busybox grep -E '^(CapEff|NoNewPrivs)' /proc/self/status").split() == [
        "CapEff:", "0000000000000000", "NoNewPrivs:", "1",
    ]  # fmt: skip


async def test_an_engine_that_forks_all_the_time_is_frozen_whole_or_not_at_all(docker_rig: DockerRig) -> None:
    backend = await docker_rig.backend()
    spec = await running(docker_rig, backend)
    forks = "for n in 1 2 3 4; do while :; do (echo >>/data/turns); done & done; wait"
    execution = docker_rig.api.exec_create(f"engine-{spec.engine_id}", ["/bin/busybox", "sh", "-c", forks])
    docker_rig.api.exec_start(execution["Id"], detach=True)
    volume = docker_rig.volume(spec.engine_id)
    assert volume is not None

    def turns() -> int:
        return (volume / "turns").stat().st_size if (volume / "turns").exists() else 0

    for _ in range(10):
        try:
            await backend.freeze(spec.engine_id)
        except BackendError as error:
            # The host gives it up now and then, and lets it go on.
            assert error.message == "it could not be frozen"  # noqa: PT017
            assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.RUNNING)
        else:
            frozen = turns()
            for _ in range(20):
                assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.FROZEN)
            assert turns() == frozen
            await backend.thaw(spec.engine_id)
        before = turns()
        await until(lambda before=before: turns() > before)  # type: ignore[misc]


async def test_engines_are_reached_by_loopback_only_from_the_host(docker_rig: DockerRig) -> None:
    backend = await docker_rig.backend()
    spec = await running(docker_rig, backend)
    listeners = [one.laddr for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert [tuple(address) for address in listeners if address[1:] == (spec.port,)] == [("127.0.0.1", spec.port)]


async def test_removal_leaves_no_nameless_volume(docker_rig: DockerRig) -> None:
    backend = await docker_rig.backend()
    spec = await running(docker_rig, backend)
    mounts = docker_rig.api.inspect_container(f"engine-{spec.engine_id}")["Mounts"]
    volumes = {mount["Name"] for mount in mounts}
    assert len(volumes) == 2

    await backend.remove(spec.engine_id, volume=False)
    left = {volume["Name"] for volume in docker_rig.api.volumes()["Volumes"]}
    assert volumes & left == {f"engine-data-{spec.engine_id}"}


async def test_a_network_made_by_others_is_used_and_many_may_open_at_once(docker_rig: DockerRig) -> None:
    docker_rig.api.create_network(docker_rig.network, driver="bridge")
    backends = await asyncio.gather(*(docker_rig.backend() for _ in range(5)))
    await running(docker_rig, backends[0])
    assert len(docker_rig.api.networks(names=[docker_rig.network])) == 1


async def test_many_that_open_at_once_make_one_network(docker_rig: DockerRig) -> None:
    await asyncio.gather(*(docker_rig.backend() for _ in range(8)))
    (network,) = docker_rig.api.networks(names=[docker_rig.network])
    assert network["Labels"] == {"september.installation": docker_rig.installation}
    assert network["Driver"] == "bridge"


async def test_a_foreign_container_or_volume_of_the_same_name_is_left_alone(docker_rig: DockerRig) -> None:
    backend = await docker_rig.backend()
    by_container, by_volume = spec_for(docker_rig), spec_for(docker_rig)
    container = docker_rig.api.create_container(docker_rig.engine, name=f"engine-{by_container.engine_id}")
    volume = docker_rig.api.create_volume(f"engine-data-{by_volume.engine_id}")
    try:
        for spec in (by_container, by_volume):
            with pytest.raises(BackendError, match="another installation"):
                await backend.create(spec)
            assert await backend.inspect(spec.engine_id) is None
            await backend.remove(spec.engine_id, volume=True)
        assert await backend.list() == []
        docker_rig.api.inspect_container(container["Id"])
        docker_rig.api.inspect_volume(volume["Name"])
    finally:
        docker_rig.api.remove_container(container["Id"], v=True)
        docker_rig.api.remove_volume(volume["Name"])


async def test_what_docker_says_stays_inside(docker_rig: DockerRig) -> None:
    backend = await docker_rig.backend(catalog_mount=Path("/nowhere/canary"))
    with pytest.raises(BackendError) as caught:
        await backend.create(spec_for(docker_rig))
    assert "canary" not in str(caught.value)
    assert "canary" in str(caught.value.__cause__)
    assert docker_rig.leftovers() == 0


async def test_an_image_that_is_not_there_is_never_pulled(docker_rig: DockerRig, proxy: Proxy) -> None:
    backend = await docker_rig.backend(base_url=proxy.url)
    with pytest.raises(BackendError, match="image"):
        await backend.create(spec_for(docker_rig, image="169.254.169.254/engine:latest"))
    assert b"/containers/create" in proxy.requests
    assert b"/images" not in proxy.requests


@pytest.mark.parametrize("step", ["create", "start"])
async def test_a_step_whose_answer_was_lost_is_adopted_by_the_next(
    docker_rig: DockerRig, proxy: Proxy, step: str
) -> None:
    backend = await docker_rig.backend(base_url=proxy.url, timeout_s=TIMEOUT_S)
    spec = spec_for(docker_rig)
    proxy.swallows = f"/{step}".encode()

    async def boot() -> None:
        await backend.create(spec)
        await backend.start(spec)

    with pytest.raises(Unavailable):
        await boot()
    proxy.swallows = None

    async def boots() -> bool:
        try:
            await boot()
        except Unavailable:
            return False
        return True

    await until(boots)
    assert await backend.list() == [Instance(spec.engine_id, 1, InstanceState.RUNNING)]


async def test_a_daemon_that_never_answers_makes_calls_unavailable_in_time(proxy: Proxy) -> None:
    proxy.silent = True
    backend = DockerBackend(uuid4().hex, "engine-test", base_url=proxy.url, timeout_s=TIMEOUT_S)
    begun = time.monotonic()
    with pytest.raises(Unavailable):
        await backend.open()
    assert time.monotonic() - begun < TIMEOUT_S + AT_ONCE_S
    with pytest.raises(Unavailable):
        await backend.list()
    await backend.close()


async def test_a_daemon_that_hangs_holds_up_nobody_and_is_used_again_when_it_is_back(
    docker_rig: DockerRig, proxy: Proxy
) -> None:
    backend = await docker_rig.backend(base_url=proxy.url, timeout_s=TIMEOUT_S, threads=4)
    spec = await running(docker_rig, await docker_rig.backend())
    proxy.silent = True

    async def seconds_until_refused() -> float:
        begun = time.monotonic()
        with pytest.raises(Unavailable):
            await backend.inspect(uuid4())
        return time.monotonic() - begun

    assert max(await asyncio.gather(*(seconds_until_refused() for _ in range(4)))) < TIMEOUT_S + AT_ONCE_S
    waits = sorted(await asyncio.gather(*(seconds_until_refused() for _ in range(20))))
    assert waits[-2] < AT_ONCE_S
    assert waits[-1] < TIMEOUT_S + AT_ONCE_S
    assert await asyncio.wait_for(asyncio.to_thread(lambda: 42), AT_ONCE_S) == 42

    proxy.silent = False

    async def answers_again() -> bool:
        try:
            return await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.RUNNING)
        except Unavailable:
            return False

    await until(answers_again)


async def test_without_a_daemon_nothing_opens_and_calls_are_unavailable() -> None:
    address = f"127.0.0.1:{free_port()}"
    backend = DockerBackend(uuid4().hex, "engine-test", base_url=f"tcp://{address}")
    for call in (backend.open(), backend.inspect(uuid4()), backend.list()):
        with pytest.raises(Unavailable) as caught:
            await call
        assert address not in str(caught.value)
    await backend.close()


async def test_a_daemon_that_goes_away_makes_calls_unavailable(docker_rig: DockerRig, proxy: Proxy) -> None:
    backend = await docker_rig.backend(base_url=proxy.url)
    spec = spec_for(docker_rig)
    proxy.closes = True
    for call in (backend.create(spec), backend.start(spec), backend.inspect(spec.engine_id), backend.list()):
        with pytest.raises(Unavailable):
            await call
    proxy.closes = False
    assert await backend.list() == []


async def test_a_new_generation_replaces_a_container_that_others_are_removing(docker_rig: DockerRig) -> None:
    backend = await docker_rig.backend()
    spec = await running(docker_rig, backend)
    removal = asyncio.create_task(backend.remove(spec.engine_id, volume=False))
    other = await docker_rig.backend()
    await other.create(replace(spec, generation=2))
    await removal
    # Whichever came last, the next attempt ends with the new one.
    await other.create(replace(spec, generation=2))
    assert await other.list() == [Instance(spec.engine_id, 2, InstanceState.CREATED)]


async def test_an_engine_is_current_until_its_images_name_stands_for_another(docker_rig: DockerRig) -> None:
    backend = await docker_rig.backend()
    name = f"{docker_rig.engine.partition(':')[0]}:moved"
    docker_rig.api.tag(docker_rig.engine, name)
    try:
        spec = spec_for(docker_rig, image=name)
        await backend.create(spec)
        await backend.start(spec)
        assert await backend.is_current(spec.engine_id, name)
        docker_rig.api.tag(docker_rig.deaf, name)
        assert not await backend.is_current(spec.engine_id, name)
    finally:
        docker_rig.api.remove_image(name, force=True)
    assert not await backend.is_current(spec.engine_id, name)


@contextmanager
def nobody() -> Iterator[None]:
    """Within the block this process is nobody, who may use the daemon."""
    group = os.stat(DAEMON).st_gid
    if os.geteuid() != 0 or group == 0:
        pytest.skip("only root may be nobody, and only a group of its own uses the daemon")
    groups = os.getgroups()
    os.setgroups([group])
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


async def test_a_disk_that_is_not_seen_is_named(docker_rig: DockerRig) -> None:
    volumes = Path(docker_rig.api.info()["DockerRootDir"]) / "volumes"

    async def unseen() -> list[str]:
        with capture_logs() as logs:
            backend = await docker_rig.backend()
            for _ in range(2):
                assert await backend.free_bytes() is not None
        return [line["directory"] for line in logs if line["event"] == "disk_not_seen"]

    assert await unseen() == []
    with nobody():
        assert await unseen() == [str(volumes)]
