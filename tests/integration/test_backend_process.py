"""What only the process backend has to show: engines among processes, on a disk."""

import asyncio
import fcntl
import os
import secrets
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from services.provisioner.backends.base import EngineSpec, Instance, InstanceState, PortTaken
from services.provisioner.backends.engine_processes import EngineProcesses
from services.shared.errors import BackendError, Unavailable
from tests.harness import ROOT
from tests.integration.backend_rigs import ProcessRig, answers, spec_for, until


class Starter:
    """A process of its own that boots an engine when told to."""

    def __init__(self, rig: ProcessRig, spec: EngineSpec) -> None:
        arguments = (rig.installation, str(rig.data_dir), str(spec.engine_id), str(spec.port))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.backend_starter", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def wait_for(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == word

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def starters(rig: ProcessRig, *specs: EngineSpec) -> Iterator[list[Starter]]:
    """Processes that are ready, one per spec."""
    made = [Starter(rig, spec) for spec in specs]
    try:
        for starter in made:
            starter.wait_for("ready")
        yield made
    finally:
        for starter in made:
            starter.kill()


async def test_an_engine_survives_the_kill_of_its_starter_and_is_adopted(process_rig: ProcessRig) -> None:
    spec = spec_for(process_rig)
    with starters(process_rig, spec) as (starter,):
        starter.go()
        await asyncio.to_thread(starter.wait_for, "started")
    life = process_rig.incarnation(spec.engine_id)

    backend = await process_rig.backend()
    assert await backend.list() == [Instance(spec.engine_id, 1, InstanceState.RUNNING)]
    await backend.create(spec)
    await backend.start(spec)
    assert process_rig.incarnation(spec.engine_id) == life
    await until(lambda: answers(spec.port))
    await backend.stop(spec.engine_id, grace_s=10)
    assert await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.EXITED)
    await backend.remove(spec.engine_id, volume=True)
    assert process_rig.leftovers() == 0


async def test_a_kill_at_any_moment_of_a_boot_leaves_at_most_one_engine(process_rig: ProcessRig) -> None:
    backend = await process_rig.backend()
    specs = [spec_for(process_rig) for _ in range(12)]
    for spec in specs:
        with starters(process_rig, spec) as (starter,):
            starter.go()
            await asyncio.sleep(secrets.randbelow(20) / 1000)
        assert process_rig.running(spec.engine_id) <= 1
        # As the next worker does: from the beginning, whatever there is.
        await backend.create(spec)
        await backend.start(spec)
        assert process_rig.running(spec.engine_id) == 1
    assert len(await backend.list()) == len(specs)
    await asyncio.gather(*(backend.remove(spec.engine_id, volume=True) for spec in specs))
    assert process_rig.leftovers() == 0


async def test_concurrent_boots_from_several_processes_make_one_engine(process_rig: ProcessRig) -> None:
    spec = spec_for(process_rig)
    with starters(process_rig, spec, spec, spec, spec) as racing:
        for starter in racing:
            starter.go()
        for starter in racing:
            await asyncio.to_thread(starter.wait_for, "started")
        assert process_rig.running(spec.engine_id) == 1
        backend = await process_rig.backend()
        assert await backend.list() == [Instance(spec.engine_id, 1, InstanceState.RUNNING)]


async def test_whoever_finds_the_engine_locked_is_told_so_in_time(process_rig: ProcessRig) -> None:
    backend = await process_rig.backend(timeout_s=0.5)
    spec = spec_for(process_rig)
    await backend.create(spec)
    # As a provisioner does that was stopped in the middle of a change.
    descriptor = os.open(process_rig.data_dir / str(spec.engine_id), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(Unavailable):
        await backend.start(spec)
    os.close(descriptor)

    async def starts() -> bool:
        try:
            await backend.start(spec)
        except Unavailable:
            return False
        return True

    await until(starts)
    assert process_rig.running(spec.engine_id) == 1


async def test_an_engine_that_ends_by_itself_has_exited_and_is_no_zombie(process_rig: ProcessRig) -> None:
    backend = await process_rig.backend()
    spec = spec_for(process_rig, image="tests.engines.exits")
    zombies_of_others = _zombies()
    await backend.create(spec)
    await backend.start(spec)

    async def exited() -> bool:
        return await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.EXITED)

    await until(exited)
    assert await backend.list() == [Instance(spec.engine_id, 1, InstanceState.EXITED)]
    assert _zombies() <= zombies_of_others


def _zombies() -> set[psutil.Process]:
    return {child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE}


async def test_a_child_that_outlived_the_engine_is_no_engine_and_ends_before_the_next_start(
    process_rig: ProcessRig,
) -> None:
    backend = await process_rig.backend()
    spec = spec_for(process_rig, image="tests.engines.parent")
    await backend.create(spec)
    await backend.start(spec)
    await until(lambda: answers(spec.port))
    volume = process_rig.volume(spec.engine_id)
    assert volume is not None
    child = psutil.Process(int((volume / "child.pid").read_text()))
    (engine,) = process_rig.processes(spec.engine_id)
    engine.kill()

    async def exited() -> bool:
        return await backend.inspect(spec.engine_id) == Instance(spec.engine_id, 1, InstanceState.EXITED)

    await until(exited)
    assert child in process_rig.processes(spec.engine_id, leaders=False)
    await backend.start(spec)
    assert child not in process_rig.processes(spec.engine_id, leaders=False)
    await backend.remove(spec.engine_id, volume=True)
    assert process_rig.leftovers() == 0


async def test_connections_left_in_time_wait_do_not_take_the_port(process_rig: ProcessRig) -> None:
    backend = await process_rig.backend()
    spec = spec_for(process_rig)
    await backend.create(spec)
    await backend.start(spec)
    await until(lambda: answers(spec.port))
    # Whoever closes first keeps TIME_WAIT: the engine, when it ends on the open connection.
    reader, writer = await asyncio.open_connection("127.0.0.1", spec.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: engine\r\n\r\n")
    await reader.readline()
    await backend.stop(spec.engine_id, grace_s=10)
    await reader.read()
    with closing(writer):
        await backend.start(spec)
    await until(lambda: answers(spec.port))


async def test_the_engine_gets_its_paths_and_nothing_else_of_our_environment(
    process_rig: ProcessRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCH_MASTER_KEY", "canary")
    backend = await process_rig.backend(catalog_dir=tmp_path)
    spec = spec_for(process_rig, environment={"ENGINE_KEY_HASH": "1" * 64, "SEPTEMBER_INSTALLATION": "forged"})
    await backend.create(spec)
    await backend.start(spec)

    (engine,) = process_rig.processes(spec.engine_id)
    environment = engine.environ()
    volume = process_rig.volume(spec.engine_id)
    assert volume is not None
    assert environment["SQLITE_DB_PATH"] == str(volume / "brain.sqlite")
    assert environment["CATALOG_DIR"] == str(tmp_path)
    assert environment["ENGINE_KEY_HASH"] == "1" * 64
    assert set(environment) == {
        "CATALOG_DIR", "ENGINE_KEY_HASH", "HOST", "PATH", "PORT", "PYTHONPATH", "PYTHONSAFEPATH", "SQLITE_DB_PATH",
        "SEPTEMBER_INSTALLATION", "SEPTEMBER_ENGINE_ID", "SEPTEMBER_GENERATION",
    }  # fmt: skip
    assert stat.S_IMODE(volume.stat().st_mode) == 0o700
    assert stat.S_IMODE(volume.parent.stat().st_mode) == 0o700


async def test_a_removal_cut_off_half_way_is_finished_by_the_next_open(process_rig: ProcessRig) -> None:
    backend = await process_rig.backend()
    spec = spec_for(process_rig)
    await backend.create(spec)
    path = process_rig.data_dir / str(spec.engine_id)
    path.rename(path.with_suffix(".trash"))
    unrelated = process_rig.data_dir / "notes.trash"
    unrelated.mkdir()

    again = await process_rig.backend()
    assert await again.list() == []
    assert list(process_rig.data_dir.iterdir()) == [unrelated]


async def test_an_unreadable_marker_hides_one_engine_and_not_the_others(process_rig: ProcessRig) -> None:
    backend = await process_rig.backend()
    poisoned, sound = spec_for(process_rig), spec_for(process_rig)
    for spec in (poisoned, sound):
        await backend.create(spec)
    (process_rig.data_dir / str(poisoned.engine_id) / "instance.json").write_text('{"installation":')
    (process_rig.data_dir / "not-an-engine").mkdir()

    assert await backend.list() == [Instance(sound.engine_id, 1, InstanceState.CREATED)]
    await backend.create(replace(poisoned, generation=2))
    assert await backend.inspect(poisoned.engine_id) == Instance(poisoned.engine_id, 2, InstanceState.CREATED)


@pytest.mark.parametrize("image", ["", "os; import sys", "../engine", ".engine", "engine.", "-c", "engine\n", "a/b"])
async def test_an_image_that_is_no_module_name_is_refused(process_rig: ProcessRig, image: str) -> None:
    backend = await process_rig.backend()
    with pytest.raises(BackendError, match="image"):
        await backend.create(spec_for(process_rig, image=image))
    assert process_rig.leftovers() == 0


async def test_a_listener_on_every_address_takes_the_port(process_rig: ProcessRig) -> None:
    backend = await process_rig.backend()
    spec = spec_for(process_rig)
    await backend.create(spec)
    server = await asyncio.start_server(lambda *_: None, "0.0.0.0", spec.port)
    async with server:
        with pytest.raises(PortTaken):
            await backend.start(spec)
    assert process_rig.running(spec.engine_id) == 0


async def test_a_stop_ends_the_whole_group(process_rig: ProcessRig) -> None:
    backend = await process_rig.backend()
    spec = spec_for(process_rig, image="tests.engines.parent")
    await backend.create(spec)
    await backend.start(spec)
    await until(lambda: answers(spec.port))
    assert len(process_rig.processes(spec.engine_id, leaders=False)) == 2
    os.kill(process_rig.processes(spec.engine_id)[0].pid, signal.SIGSTOP)

    await backend.stop(spec.engine_id, grace_s=10)
    assert process_rig.processes(spec.engine_id, leaders=False) == []


def test_engines_that_were_found_stay_as_they_are_while_another_is_spawned(tmp_path: Path) -> None:
    processes, engine_id = EngineProcesses(secrets.token_hex(8)), uuid4()
    found = processes.engines()
    processes.spawn(engine_id, 1, "tests.engines.deaf", os.environ, ROOT, tmp_path / "log")
    assert processes.find(engine_id) is not None
    assert found == {}
    processes.kill(engine_id, 10)
