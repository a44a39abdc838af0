"""The registry and what exists disagree, in every way; a pass makes them agree and harms nobody."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import psutil
import psycopg
import pytest

from september.engine.v1 import denial_pb2, engine_pb2
from services.provisioner.backends.base import EngineSpec, Instance, InstanceState
from services.provisioner.backends.process import ProcessBackend
from services.provisioner.loops.reconciler import Reconciler
from services.provisioner.store.intents import IntentStore
from services.provisioner.store.ports import PortAllocator
from services.provisioner.store.reconcile import ReconcileStore
from services.shared.errors import BackendError
from services.shared.postgres import Database
from tests.harness import Clients, Platform, Product, eventually
from tests.integration.backend_rigs import free_port
from tests.integration.test_life_cycle import User, execute, process_of

Connect = Callable[..., Clients]
STATUS = engine_pb2.Engine.Status
REASON = denial_pb2.Denial.Reason
# Only the passes that a test makes, and nobody else to see to engines.
ALONE = {"ORCH_RECONCILE_INTERVAL_S": "3600", "ORCH_HEALTH_CHECK_INTERVAL_S": "3600"}


class WatchedBackend(ProcessBackend):
    """A real one, with which something may happen between a list and what is done about it."""

    after_list: Callable[[], Any] | None = None
    refuses: UUID | None = None

    async def list(self) -> list[Instance]:
        found = await super().list()
        if self.after_list is not None:
            happens, self.after_list = self.after_list, None
            await happens()
        return found

    async def remove(self, engine_id: UUID, *, volume: bool) -> None:
        if engine_id == self.refuses:
            raise BackendError("this host refused")
        await super().remove(engine_id, volume=volume)


@dataclass
class Scene:
    """A platform, and a reconciler of the test's own on the same registry and the same host."""

    platform: Platform
    clients: Clients
    product: Product
    backend: WatchedBackend
    reconciler: Reconciler

    def user(self, user_id: str = "u1") -> User:
        return User(self.clients, self.product, user_id)

    async def provision(self, user_id: str = "u1") -> Any:
        return await self.user(user_id).call("Provision")

    async def asleep(self, user_id: str = "u1") -> Any:
        made = await self.provision(user_id)
        await self.user(user_id).sleep()
        return made

    def process(self, engine_id: object) -> psutil.Process | None:
        return process_of(self.platform, str(engine_id))

    def alive(self, engine_id: object) -> psutil.Process:
        process = self.process(engine_id)
        assert process is not None
        return process

    async def kill(self, engine: Any) -> None:
        self.alive(engine.engine_id).kill()
        await asyncio.to_thread(eventually, lambda: self.process(engine.engine_id) is None, "it is dead")

    def row(self, engine: Any, columns: str) -> tuple[Any, ...]:
        (row,) = self.platform.query(f"SELECT {columns} FROM engines WHERE engine_id = %s", UUID(engine.engine_id))
        return row

    def repairs(self) -> list[tuple[str, str]]:
        """Operations of the platform's own, and why."""
        return self.platform.query(
            "SELECT action, detail FROM audit_events WHERE actor = 'system' AND outcome = 'requested' ORDER BY event_id"
        )

    async def passes(self, count: int = 1) -> None:
        for _ in range(count):
            await self.reconciler.tick()
        await asyncio.to_thread(eventually, lambda: self.platform.open_operations() == 0, "all repairs are done")

    def has_volume(self, engine_id: object) -> bool:
        return (self.platform.directory / "var" / "engines" / str(engine_id) / "data").is_dir()

    async def stray(self, backend: ProcessBackend | None = None) -> UUID:
        """A running engine that no row knows."""
        spec = EngineSpec(uuid4(), 1, "services.engine", free_port(), {"ENGINE_KEY_HASH": "0" * 64})
        backend = backend or self.backend
        await backend.create(spec)
        await backend.start(spec)
        return spec.engine_id


@pytest.fixture
async def scene(platform: Platform, connect: Connect) -> AsyncIterator[Scene]:
    provisioner = platform.provisioner(**ALONE)
    clients = connect(platform, provisioner, platform.admission(provisioner))
    backend = WatchedBackend(platform.installation(), platform.directory / "var" / "engines")
    await backend.open()
    database = Database(platform.database_url, application_name="test")
    await database.open()
    intents = IntentStore(
        database,
        node="local",
        platform_image="services.engine",
        ports=PortAllocator("local", range(0)),
        url_of=lambda engine_id, port: "",
        check_disk=lambda: None,
    )

    reconciler = Reconciler(ReconcileStore(database, node="local"), intents, backend, interval_s=3600)
    yield Scene(platform, clients, await clients.register(), backend, reconciler)
    await database.close()
    await backend.close()


async def test_what_agrees_is_left_alone(scene: Scene) -> None:
    await scene.provision("u1")
    await scene.asleep("u2")
    await scene.provision("u3")
    await scene.user("u3").call("Stop")
    before = scene.platform.query("SELECT * FROM engines ORDER BY engine_id"), scene.platform.engine_processes()
    await scene.passes(3)
    assert (
        scene.platform.query("SELECT * FROM engines ORDER BY engine_id"),
        scene.platform.engine_processes(),
    ) == before
    assert scene.repairs() == []


async def test_an_engine_that_ended_is_started_again_and_admits_join_it(scene: Scene) -> None:
    made = await scene.provision()
    await scene.kill(made)
    await scene.reconciler.tick()
    admitted = (await scene.user().admit()).engine
    assert (admitted.engine_id, admitted.api_key, admitted.url) == (made.engine_id, made.api_key, made.url)
    assert await execute(admitted.url, admitted.api_key, "hello")
    assert scene.repairs() == [("start", "its instance had ended")]


async def test_an_engine_that_somebody_froze_is_thawed_with_its_memory(scene: Scene) -> None:
    made = await scene.provision()
    process = scene.alive(made.engine_id)
    await execute(made.url, made.api_key, "hello")
    os.killpg(process.pid, signal.SIGSTOP)
    await asyncio.to_thread(eventually, lambda: process.status() == psutil.STATUS_STOPPED, "it is frozen")
    await scene.passes()
    assert scene.alive(made.engine_id) == process
    assert scene.row(made, "status") == ("running",)
    assert (await execute(made.url, made.api_key, "again"))[-1]["messages"] == 4
    assert scene.repairs() == [("start", "its instance was frozen")]


async def test_a_sleeper_that_runs_is_not_called_asleep(scene: Scene) -> None:
    made = await scene.asleep()
    process = scene.alive(made.engine_id)
    os.killpg(process.pid, signal.SIGCONT)
    await asyncio.to_thread(eventually, lambda: process.status() != psutil.STATUS_STOPPED, "it runs")
    await scene.passes()
    assert scene.row(made, "status") == ("running",)
    assert scene.alive(made.engine_id) == process
    assert (await scene.user().admit()).admitted
    assert scene.repairs() == [("wake", "its instance was running")]


async def test_a_sleeper_whose_memory_is_lost_sleeps_deeply_and_still_wakes(scene: Scene) -> None:
    made = await scene.asleep()
    assert scene.row(made, "deep_asleep") == (False,)
    await scene.kill(made)
    await scene.passes()
    assert scene.row(made, "status, deep_asleep") == ("sleeping", True)
    assert scene.process(made.engine_id) is None
    woken = (await scene.user().admit(auto_wake=True)).engine
    assert (woken.engine_id, woken.url) == (made.engine_id, made.url)
    assert scene.row(made, "status, deep_asleep") == ("running", False)
    assert scene.repairs() == []


@pytest.mark.parametrize("frozen", [False, True])
async def test_a_stopped_engine_that_runs_is_stopped(scene: Scene, frozen: bool) -> None:
    made = await scene.provision()
    await scene.user().call("Stop")
    spec = EngineSpec(UUID(made.engine_id), 1, "services.engine", free_port(), {"ENGINE_KEY_HASH": "0" * 64})
    await scene.backend.start(spec)
    if frozen:
        await scene.backend.freeze(spec.engine_id)
    await scene.passes()
    assert scene.process(made.engine_id) is None
    assert scene.row(made, "status") == ("stopped",)
    assert scene.repairs() == [("stop", "its instance was running")]


async def test_statuses_that_nobody_works_on_are_brought_to_an_end(scene: Scene) -> None:
    booting, dying = await scene.provision("u1"), await scene.provision("u2")
    for engine, status in ((booting, "provisioning"), (dying, "destroying")):
        scene.platform.query("UPDATE engines SET status = %s WHERE engine_id = %s", status, UUID(engine.engine_id))
    await scene.passes()
    assert scene.platform.query("SELECT engine_id::text, status FROM engines") == [(booting.engine_id, "running")]
    assert set(scene.platform.counts().values()) == {1}


async def test_an_open_operation_decides_alone(scene: Scene) -> None:
    made = await scene.provision()
    scene.platform.query(
        "INSERT INTO operations (operation_id, engine_id, product_id, user_id, node, kind, actor, not_before)"
        " SELECT gen_random_uuid(), engine_id, product_id, user_id, node, 'stop', 'test', 'infinity' FROM engines"
    )
    await scene.kill(made)
    await scene.reconciler.tick()
    assert scene.row(made, "status") == ("running",)
    assert scene.repairs() == []


async def test_a_stray_goes_at_the_second_look_and_its_volume_stays(scene: Scene) -> None:
    kept = await scene.provision()
    stray = await scene.stray()
    other = ProcessBackend(uuid4().hex, scene.platform.directory / "var" / "engines")
    await other.open()
    foreign = await scene.stray(other)
    try:
        await scene.passes()
        assert scene.process(stray)
        await scene.passes()
        assert scene.process(stray) is None
        assert await scene.backend.inspect(stray) is None
        assert scene.has_volume(stray)
        await scene.passes()
        assert scene.alive(kept.engine_id)
        instance = await other.inspect(foreign)
        assert instance is not None
        assert instance.state is InstanceState.RUNNING
    finally:
        await other.remove(foreign, volume=True)
        await other.close()


async def test_the_volume_of_a_stray_goes_if_its_destroy_was_asked_for(scene: Scene) -> None:
    made = await scene.provision()
    await scene.user().call("Destroy")
    # As a worker that was asleep all the while would make it.
    spec = EngineSpec(UUID(made.engine_id), 1, "services.engine", free_port(), {"ENGINE_KEY_HASH": "0" * 64})
    await scene.backend.create(spec)
    await scene.backend.start(spec)
    await scene.passes(2)
    assert scene.platform.counts() == {"rows": 0, "ports": 0, "processes": 0, "volumes": 0}


async def test_nothing_is_removed_for_a_registry_that_knows_nobody(scene: Scene) -> None:
    for index in range(10):
        await scene.provision(f"u{index}")
    processes = scene.platform.engine_processes()
    assert len(processes) == 10
    with psycopg.connect(scene.platform.database_url, autocommit=True) as connection:
        for table in ("engines", "port_leases"):
            connection.execute(f"CREATE TABLE kept_{table} AS SELECT * FROM {table}".encode())
        connection.execute("DELETE FROM port_leases")
        connection.execute("DELETE FROM engines")
    await scene.passes(4)
    assert scene.platform.engine_processes() == processes
    with psycopg.connect(scene.platform.database_url, autocommit=True) as connection:
        for table in ("engines", "port_leases"):
            connection.execute(f"INSERT INTO {table} SELECT * FROM kept_{table}".encode())
    await scene.passes(2)
    assert scene.platform.engine_processes() == processes
    assert scene.repairs() == []
    assert set(scene.platform.counts().values()) == {10}


async def test_as_many_strays_as_may_be_are_removed_and_one_more_are_not(scene: Scene) -> None:
    strays = [await scene.stray() for _ in range(4)]
    await scene.passes(3)
    assert all(scene.process(stray) for stray in strays)
    await scene.backend.remove(strays[0], volume=True)
    await scene.passes()
    assert not any(scene.process(stray) for stray in strays)


async def test_an_engine_made_between_the_two_looks_is_not_touched(scene: Scene) -> None:
    await scene.provision("u0")
    made: list[Any] = []

    async def newborn() -> None:
        made.append(await scene.provision(f"u{len(made) + 1}"))

    for _ in range(3):
        scene.backend.after_list = newborn
        await scene.passes()
    assert len(made) == 3
    assert len(scene.platform.engine_processes()) == 4
    assert scene.repairs() == []
    assert set(scene.platform.counts().values()) == {4}


async def test_an_engine_destroyed_between_the_two_looks_leaves_nothing(scene: Scene) -> None:
    await scene.provision()
    scene.backend.after_list = lambda: scene.user().call("Destroy")
    await scene.passes(2)
    await scene.provision()
    await scene.passes(2)
    assert set(scene.platform.counts().values()) == {1}


async def test_a_row_that_nobody_understands_stops_nothing(scene: Scene) -> None:
    strange, dead = await scene.provision("u1"), await scene.provision("u2")
    scene.platform.query("ALTER TABLE engines DROP CONSTRAINT engines_status_check")
    scene.platform.query("UPDATE engines SET status = 'hibernating' WHERE user_id = 'u1'")
    await scene.kill(dead)
    await scene.passes(3)
    assert scene.row(dead, "status") == ("running",)
    assert scene.row(strange, "status") == ("hibernating",)
    assert scene.alive(strange.engine_id)


async def test_a_row_that_can_not_be_repaired_stops_nothing(scene: Scene) -> None:
    broken, dead = await scene.provision("u1"), await scene.provision("u2")
    scene.platform.query(
        f"ALTER TABLE operations ADD CONSTRAINT broken CHECK (engine_id <> '{broken.engine_id}') NOT VALID"
    )
    for engine in (broken, dead):
        await scene.kill(engine)
    await scene.passes()
    assert (scene.row(broken, "status"), scene.row(dead, "status")) == (("running",), ("running",))
    assert scene.process(broken.engine_id) is None
    assert scene.process(dead.engine_id)
    assert scene.repairs() == [("start", "its instance had ended")]


async def test_a_stray_that_can_not_be_removed_stops_nothing(scene: Scene) -> None:
    strays = [await scene.stray() for _ in range(3)]
    scene.backend.refuses = strays[0]
    await scene.passes(2)
    assert [stray for stray in strays if scene.process(stray)] == strays[:1]
    scene.backend.refuses = None
    await scene.passes()
    assert scene.process(strays[0]) is None


async def test_engines_of_another_node_are_nobodys_strays(scene: Scene) -> None:
    made = await scene.provision()
    scene.platform.query("UPDATE port_leases SET node = 'other'")
    scene.platform.query("UPDATE engines SET node = 'other'")
    await scene.passes(3)
    assert scene.alive(made.engine_id)
    assert scene.repairs() == []


async def test_of_several_provisioners_one_reconciles(platform: Platform, connect: Connect) -> None:
    settings = {"ORCH_RECONCILE_INTERVAL_S": "1"}
    provisioners = [platform.provisioner(**settings) for _ in range(3)]
    backend = ProcessBackend(platform.installation(), platform.directory / "var" / "engines")
    await backend.open()
    spec = EngineSpec(uuid4(), 1, "services.engine", free_port(), {"ENGINE_KEY_HASH": "0" * 64})
    await backend.create(spec)
    await backend.start(spec)
    await backend.close()

    def removals() -> list[str]:
        events = [event for provisioner in provisioners for event in provisioner.events()]
        return [event["engine_id"] for event in events if event["event"] == "stray_removed"]

    await asyncio.to_thread(eventually, removals, "the stray is removed")
    assert removals() == [str(spec.engine_id)]
    assert process_of(platform, str(spec.engine_id)) is None
