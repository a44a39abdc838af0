"""Backup and restore, with real engines and their data, on both backends."""

import asyncio
import io
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import psycopg
import pytest
from docker import APIClient
from psycopg.conninfo import conninfo_to_dict

from services.provisioner.backends.base import Instance
from services.provisioner.backends.docker_volumes import DockerVolumes
from services.provisioner.backends.engine_template import INSTALLATION_LABEL
from services.provisioner.backends.process import ProcessBackend
from services.provisioner.backends.volumes import DirectoryVolumes
from services.provisioner.backup import LEASE_S, back_up
from services.provisioner.store.backup import BackupStore
from services.provisioner.store.migrations import migrate
from services.shared.errors import ServiceError, Unavailable
from services.shared.postgres import Database
from tests.e2e.test_docker import IMAGE, DockerPlatform, images
from tests.harness import ROOT, Clients, Platform, eventually, new_database, running_platform
from tests.integration.docker_daemon import docker_api, remove_all
from tests.integration.test_life_cycle import REASON, User

__all__ = ["docker_api", "images"]

Connect = Callable[..., Clients]
PORTS = {"ORCH_PORT_MIN": "25000", "ORCH_PORT_MAX": "25999"}


@pytest.fixture(params=["process", "docker"])
def platform(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> Iterator[Platform]:
    if request.param == "process":
        with running_platform(database_url, tmp_path, **PORTS) as platform:
            yield platform
            platform.database_url = database_url  # Says whose engines they are, also if the copy has failed.
        return
    api = request.getfixturevalue("docker_api")
    request.getfixturevalue("images")
    docker = DockerPlatform(database_url, tmp_path, ORCH_ENGINE_BACKEND="docker", ORCH_ENGINE_IMAGE=IMAGE, **PORTS)
    docker.api = api
    try:
        yield docker
    finally:
        docker.close()
        docker.database_url = database_url
        with suppress(psycopg.Error):
            remove_all(api, docker.installation())


async def september(platform: Platform, *command: str | Path) -> str:
    """Runs a command of the platform; its output, or its error with a `!` before it."""
    path = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": f"{ROOT}:{ROOT / 'gen' / 'python'}"}
    ended = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "services.cli", *command], env={**path, **platform.environment},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return f"!{ended.stderr}" if ended.returncode else ended.stdout


async def turn(engine: Any) -> int:
    """How many turns the engine's conversation has, after one more."""
    body = {"conversation_id": "c1", "message": "hello"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{engine.url}/execute", json=body, headers={"X-Engine-Key": engine.api_key}) as answer,
    ):
        found = re.search(r'"turn": (\d+)', await answer.text())
        assert found is not None
        return int(found[1])


async def admitted(user: User, **options: bool) -> Any:
    """The user's engine, once it is admitted to: after a restore it has to come up first."""
    async with asyncio.timeout(30):
        while True:
            answer = await user.admit(**options)
            if answer.admitted:
                return answer.engine
            await asyncio.sleep(0.05)


def new_registry(platform: Platform) -> None:
    """The registry is lost, and an empty database takes its place."""
    platform.database_url = new_database(re.sub(r"/test_\w+\?", "/postgres?", platform.database_url))
    platform.environment["ORCH_DATABASE_URL"] = platform.database_url


def end_services(platform: Platform) -> None:
    for service in platform.services:
        service.terminate()


def lose_engines(platform: Platform, installation: str) -> None:
    """All instances are lost, with their volumes."""
    if isinstance(platform, DockerPlatform):
        remove_all(platform.api, installation)
        return
    for process in platform.engine_processes():
        process.kill()
    eventually(lambda: not platform.engine_processes(), "every engine has ended")
    shutil.rmtree(platform.directory / "var" / "engines")


def volumes(platform: Platform, installation: str) -> int:
    if isinstance(platform, DockerPlatform):
        filters = {"label": f"{INSTALLATION_LABEL}={installation}"}
        return len(platform.api.volumes(filters=filters)["Volumes"] or [])
    return len(list((platform.directory / "var" / "engines").glob("*/data")))


async def test_what_was_backed_up_comes_back(platform: Platform, connect: Connect, tmp_path: Path) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    product = await clients.register()
    running, stopped, asleep, destroyed = (User(clients, product, name) for name in ("r", "s", "a", "d"))
    before = {}
    for user in (running, stopped, asleep, destroyed):
        before[user.user_id] = (await user.admit(auto_provision=True)).engine
        assert await turn(before[user.user_id]) == 1
    await stopped.call("Stop")
    await asleep.sleep()
    await destroyed.call("Destroy")

    copy = tmp_path / "copy"
    assert (await september(platform, "backup", copy)).startswith("3 engines of 1 products")
    assert await turn(before["r"]) == 2, "it goes on, and the copy is from before"
    assert platform.query("SELECT outcome, count(*) FROM operations WHERE kind = 'backup' GROUP BY 1") == [
        ("succeeded", 3)
    ]
    everything = b"".join(path.read_bytes() for path in copy.iterdir())
    for secret in (product.key, before["r"].api_key, platform.environment["ORCH_MASTER_KEY"], platform.admin_key):
        assert secret.encode() not in everything
    assert copy.stat().st_mode & 0o777 == 0o700

    installation = platform.installation()
    end_services(platform)
    lose_engines(platform, installation)
    new_registry(platform)
    # Once more, as after an end between volumes and rows.
    assert (await september(platform, "restore", copy)).startswith("3 engines of 1 products")
    new_registry(platform)
    assert (await september(platform, "restore", copy)).startswith("3 engines of 1 products")
    assert platform.installation() == installation
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    for user in (running, stopped, asleep, destroyed):
        user.clients = clients
    engine = await admitted(running)
    assert (engine.engine_id, engine.api_key) == (before["r"].engine_id, before["r"].api_key)
    assert await turn(engine) == 2
    assert (await stopped.admit()).reason == REASON.engine_sleeping
    await stopped.call("Start")
    assert await turn(await admitted(stopped)) == 2
    assert await turn(await admitted(asleep, auto_wake=True)) == 2
    assert (await destroyed.admit()).reason == REASON.engine_not_found
    assert set(platform.counts().values()) == {3}


async def test_a_backup_restored_twice_takes_nothing_back(platform: Platform, connect: Connect, tmp_path: Path) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    user = User(clients, await clients.register(), "u1")
    assert await turn((await user.admit(auto_provision=True)).engine) == 1
    copy = tmp_path / "copy"
    await september(platform, "backup", copy)
    end_services(platform)
    lose_engines(platform, platform.installation())

    for turns in (2, 3):
        new_registry(platform)
        assert ("its data was there already" in await september(platform, "restore", copy)) == (turns == 3)
        provisioner = platform.provisioner()
        user.clients = connect(platform, provisioner, platform.admission(provisioner))
        assert await turn(await admitted(user)) == turns
        end_services(platform)
    assert volumes(platform, platform.installation()) == 1


def archive(path: Path, content: bytes) -> Path:
    """A copy of a volume that has one file."""
    data, file = tarfile.TarInfo("data"), tarfile.TarInfo("data/file")
    data.type, data.mode, file.size = tarfile.DIRTYPE, 0o755, len(content)
    with tarfile.open(path, "w") as tar:
        tar.addfile(data)
        tar.addfile(file, io.BytesIO(content))
    return path


@pytest.fixture
def docker_volumes(docker_api: APIClient) -> Iterator[Callable[[], DockerVolumes]]:
    """What copies volumes of one installation, as often as asked for."""
    installation = str(uuid4())
    with ExitStack() as stack:
        stack.callback(remove_all, docker_api, installation)

        def opened() -> DockerVolumes:
            volumes = DockerVolumes(installation)
            volumes.open()
            stack.callback(volumes.close)
            return volumes

        yield opened


def test_a_volume_that_was_restored_halfway_is_made_anew(
    docker_volumes: Callable[[], DockerVolumes], tmp_path: Path
) -> None:
    volumes, engine_id = docker_volumes(), uuid4()
    whole = archive(tmp_path / "whole.tar", b"x" * 2**20)
    half = tmp_path / "half.tar"
    half.write_bytes(whole.read_bytes()[: 2**19])
    with pytest.raises(ServiceError):
        volumes.restore(engine_id, half)
    assert volumes.restore(engine_id, whole)
    assert not volumes.restore(engine_id, archive(tmp_path / "other.tar", b"y"))
    assert volumes.save(engine_id, tmp_path / "copy.tar")
    with tarfile.open(tmp_path / "copy.tar") as tar:
        assert tar.getmember("data/file").size == 2**20


def test_a_copy_that_ends_leaves_another_its_image(docker_volumes: Callable[[], DockerVolumes], tmp_path: Path) -> None:
    ending, going_on, engine_id = docker_volumes(), docker_volumes(), uuid4()
    ending.close()
    assert going_on.restore(engine_id, archive(tmp_path / "whole.tar", b"x"))


async def test_what_the_url_leaves_open_the_environment_says(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate(database_url)
    monkeypatch.setenv("PGHOST", str(conninfo_to_dict(database_url)["host"]))
    database = Database(database_url, application_name="test")
    await database.open()
    store = BackupStore(database, database_url.partition("?")[0], node="local", lease_s=LEASE_S)
    assert (await store.dump(tmp_path / "registry.sql")).engines == []
    await database.close()


@pytest.mark.parametrize("platform", ["process"], indirect=True)
async def test_what_can_not_be_restored_is_refused_before_anything_is_touched(
    platform: Platform, tmp_path: Path
) -> None:
    platform.provisioner().terminate()
    copy = tmp_path / "copy"
    assert (await september(platform, "backup", copy)).startswith("0 engines of 0 products")
    assert "there is a registry already" in await september(platform, "restore", copy)

    new_registry(platform)
    manifest = copy / "manifest.json"
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**whole, "migrations": [*whole["migrations"], "9999_x.sql"]}))
    assert "later version: 9999_x.sql" in await september(platform, "restore", copy)
    manifest.write_text(json.dumps({**whole, "backend": "docker"}))
    assert "by the backend docker" in await september(platform, "restore", copy)
    with (copy / "registry.sql").open("a") as file:
        file.write("-- changed\n")
    assert "registry.sql is not as it was" in await september(platform, "restore", copy)
    assert platform.query("SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace") == []


async def test_a_restored_old_dump_deletes_no_fleet(platform: Platform, connect: Connect, tmp_path: Path) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    product = await clients.register()
    user = User(clients, product, "old")
    assert await turn((await user.admit(auto_provision=True)).engine) == 1
    await september(platform, "backup", tmp_path / "old")
    assert await turn(await admitted(user)) == 2
    await asyncio.gather(*(User(clients, product, f"u{n}").admit(auto_provision=True) for n in range(5)))
    installation = platform.installation()

    end_services(platform)
    new_registry(platform)
    assert "its data was there already" in await september(platform, "restore", tmp_path / "old")
    provisioner = platform.provisioner(ORCH_RECONCILE_INTERVAL_S="1")
    user.clients = connect(platform, provisioner, platform.admission(provisioner))

    def braked() -> bool:
        return len([event for event in provisioner.events() if event["event"] == "reconcile_brake"]) >= 2

    await asyncio.to_thread(eventually, braked, "the reconciler has refused to remove so many, and again")
    assert volumes(platform, installation) == 6
    counts = platform.counts()
    assert counts.get("containers", counts.get("processes")) == 6
    assert await turn(await admitted(user)) == 3, "its data is that of now"


async def test_a_copy_of_an_engine_at_work_is_whole(platform: Platform, connect: Connect, tmp_path: Path) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    engine = (await User(clients, await clients.register(), "u1").admit(auto_provision=True)).engine
    turns = 0

    async def work() -> None:
        nonlocal turns
        while True:
            turns = await turn(engine)

    working = asyncio.create_task(work())
    before, copy = turns, tmp_path / "copy"
    assert (await september(platform, "backup", copy)).startswith("1 engines")
    after = turns
    with tarfile.open(copy / f"{engine.engine_id}.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    with closing(sqlite3.connect(tmp_path / "data" / "brain.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        ((copied,),) = database.execute("SELECT count(DISTINCT turn) FROM messages")
    assert before <= copied <= after + 1
    assert not working.done(), "it goes on"
    working.cancel()
    with suppress(asyncio.CancelledError):
        await working


@pytest.mark.parametrize("platform", ["process"], indirect=True)
async def test_a_backup_that_dies_leaves_no_engine_frozen(platform: Platform, connect: Connect, tmp_path: Path) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    user = User(clients, await clients.register(), "u1")
    engine = (await user.admit(auto_provision=True)).engine
    large = platform.directory / "var" / "engines" / engine.engine_id / "data" / "large"
    with large.open("wb") as file:
        file.truncate(8 * 2**30)
    dying = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "services.cli", "backup", str(tmp_path / "copy")],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'gen' / 'python'}", **platform.environment},
    )
    (process,) = platform.engine_processes()
    await asyncio.to_thread(eventually, lambda: process.status() == "stopped", "the engine stands still")
    stop = asyncio.create_task(user.call("Stop"))
    dying.kill()
    dying.wait()
    shutil.rmtree(tmp_path / "copy")
    assert not stop.done(), "nothing is done to an engine that is being copied"
    platform.query("UPDATE operations SET lease_until = clock_timestamp() WHERE kind = 'backup'")
    await stop
    assert platform.query("SELECT outcome FROM operations WHERE kind = 'backup'") == [("cancelled",)]
    await user.call("Start")
    assert await turn(await admitted(user)) == 1


class Unthawing(ProcessBackend):
    """Can't be reached once it has frozen an engine."""

    async def thaw(self, engine_id: UUID) -> Instance | None:
        raise Unavailable("it can't be reached")


@pytest.mark.parametrize("platform", ["process"], indirect=True)
async def test_an_engine_that_could_not_be_thawed_is_thawed_by_a_provisioner(
    platform: Platform, connect: Connect, tmp_path: Path
) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner))
    user = User(clients, await clients.register(), "u1")
    engine = (await user.admit(auto_provision=True)).engine
    database = Database(platform.database_url, application_name="test")
    await database.open()
    store = BackupStore(database, platform.database_url, node="local", lease_s=LEASE_S)
    directory = platform.directory / "var" / "engines"
    backend = Unthawing(platform.installation(), directory)
    await backend.open()
    made = await back_up(tmp_path / "copy", store, backend, DirectoryVolumes(directory), kind="process")
    await backend.close()
    await database.close()
    assert made.missing == {UUID(engine.engine_id): "it can't be reached"}
    (process,) = platform.engine_processes()
    assert process.status() == "stopped"
    platform.query("UPDATE operations SET lease_until = clock_timestamp() WHERE kind = 'backup'")
    await asyncio.to_thread(eventually, lambda: process.status() != "stopped", "the engine goes on")
    assert await turn(engine) == 1
