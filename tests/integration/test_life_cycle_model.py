"""The life cycle against a model: any sequence of calls, and of deaths of engines and of the Provisioner.

After every step the answer is the one that the model gives, and rows, processes and ports agree.
"""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.engine.v1 import denial_pb2, engine_pb2
from tests.harness import Clients, Platform, Product, eventually, new_database, reason
from tests.integration.test_life_cycle import User, accepted, process_of

pytestmark = pytest.mark.early(20)

STATUS = engine_pb2.Engine.Status
# A failure is shown as it happened: a second run of real processes is another run.
CHAOS = settings(max_examples=3, stateful_step_count=10, deadline=None, phases=[Phase.generate])
USERS = ["u1", "u2", "u3"]
MAX_ENGINES = 2
QUICK = {
    "ORCH_OPERATION_LEASE_S": "1",
    "ORCH_HEALTH_CHECK_INTERVAL_S": "1",
    "ORCH_RESTART_BACKOFF_BASE_S": "0.1",
    "ORCH_RECONCILE_INTERVAL_S": "1",
    "ORCH_PORT_MIN": "25000",
    "ORCH_PORT_MAX": "25999",
}

# What each call answers, by the status of the engine ("none" for no engine): the status that it
# leads to, or the error that it gives.
CALLS = {
    "Provision": {"none": "running", **dict.fromkeys(["running", "sleeping", "stopped"], "ENGINE_ALREADY_EXISTS")},
    "Start": {
        "none": "ENGINE_NOT_FOUND",
        "running": "ENGINE_ALREADY_RUNNING",
        "sleeping": "running",
        "stopped": "running",
    },
    "Wake": {
        "none": "ENGINE_NOT_FOUND",
        "running": "ENGINE_ALREADY_RUNNING",
        "sleeping": "running",
        "stopped": "ENGINE_NOT_RUNNING",
    },
    "Sleep": {
        "none": "ENGINE_NOT_FOUND",
        "running": "sleeping",
        **dict.fromkeys(["sleeping", "stopped"], "ENGINE_NOT_RUNNING"),
    },
    "Stop": {"none": "ENGINE_NOT_FOUND", "running": "stopped", "sleeping": "stopped", "stopped": "ENGINE_NOT_RUNNING"},
    "Rotate": {
        "none": "ENGINE_NOT_FOUND",
        "running": "running",
        **dict.fromkeys(["sleeping", "stopped"], "ENGINE_NOT_RUNNING"),
    },
    "Destroy": {"none": "ENGINE_NOT_FOUND", **dict.fromkeys(["running", "sleeping", "stopped"], "none")},
}


class World:
    """The platform under test, which outlives the examples."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.runner = asyncio.Runner()
        self.start()

    def start(self) -> None:
        self.provisioner = self.platform.provisioner(**QUICK)
        self.admission = self.platform.admission(self.provisioner)
        self.clients = self.run(self._connect())

    async def _connect(self) -> Clients:
        return Clients(self.platform, self.provisioner.address, self.admission.address)

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def restart_provisioner(self) -> None:
        """SIGKILL, and a new one, with an Admission that knows where it is."""
        self.run(self.clients.close())
        self.provisioner.kill()
        self.admission.terminate()
        self.start()

    def close(self) -> None:
        self.run(self.clients.close())
        self.runner.close()


class LifeCycle(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.statuses: dict[str, str] = {}
        self.keys: dict[str, str] = {}

    @initialize()
    def begin(self) -> None:
        product: Product = self.world.run(self._register())
        self.product = product
        self.statuses = dict.fromkeys(USERS, "none")

    async def _register(self) -> Product:
        product: Product = await self.world.clients.register(max_engines=MAX_ENGINES)
        return product

    def user(self, user_id: str) -> User:
        return User(self.world.clients, self.product, user_id)

    def expected(self, verb: str, user_id: str) -> str:
        engines = sum(status != "none" for status in self.statuses.values())
        if verb == "Provision" and self.statuses[user_id] == "none" and engines >= MAX_ENGINES:
            return "QUOTA_EXCEEDED"
        return CALLS[verb][self.statuses[user_id]]

    @rule(verb=st.sampled_from(sorted(CALLS)), user_id=st.sampled_from(USERS))
    def call(self, verb: str, user_id: str) -> None:
        expected = self.expected(verb, user_id)
        answered = self.world.run(self._call(verb, user_id))
        assert answered == expected, f"{verb} of a {self.statuses[user_id]} engine"
        if expected.islower():
            self.statuses[user_id] = expected
        if verb == "Destroy":
            self.keys.pop(user_id, None)
        self.check()

    async def _call(self, verb: str, user_id: str) -> str:
        user = self.user(user_id)
        try:
            if verb == "Sleep":
                answer = await user.sleep()
            elif verb == "Rotate":
                self.keys[user_id] = await user.rotate()
                return "running"
            else:
                answer = await user.call(verb)
        except grpc.aio.AioRpcError as error:
            return reason(error)
        if verb == "Provision":
            self.keys[user_id] = answer.api_key
        return "none" if verb == "Destroy" else STATUS.Name(answer.status)

    @rule(user_id=st.sampled_from(USERS), auto_provision=st.booleans(), auto_wake=st.booleans())
    def admit(self, user_id: str, auto_provision: bool, auto_wake: bool) -> None:
        status = self.statuses[user_id]
        answer = self.world.run(self._admit(user_id, auto_provision, auto_wake))
        if status == "none" and auto_provision:
            expected = self.expected("Provision", user_id)
        elif status == "sleeping" and auto_wake:
            expected = "running"
        else:
            denials = {"none": "engine_not_found", "sleeping": "engine_sleeping", "stopped": "engine_sleeping"}
            expected = denials.get(status, "running")
        assert answer == expected
        if answer == "running":
            self.statuses[user_id] = "running"
        self.check()

    async def _admit(self, user_id: str, auto_provision: bool, auto_wake: bool) -> str:
        try:
            answer: admission_pb.AdmitResponse = await self.user(user_id).admit(
                auto_provision=auto_provision, auto_wake=auto_wake
            )
        except grpc.aio.AioRpcError as error:
            return reason(error)
        if not answer.admitted:
            return denial_pb2.Denial.Reason.Name(answer.reason)
        assert self.keys.setdefault(user_id, answer.engine.api_key) == answer.engine.api_key
        assert await accepted(answer.engine.url, answer.engine.api_key)
        return STATUS.Name(answer.engine.status)

    @precondition(lambda self: "running" in self.statuses.values())
    @rule(data=st.data())
    def kill_engine(self, data: st.DataObject) -> None:
        """A running engine that dies is running again by itself."""
        running = [user_id for user_id, status in self.statuses.items() if status == "running"]
        user_id = data.draw(st.sampled_from(running))
        [(engine_id,)] = self.world.platform.query(
            "SELECT engine_id FROM engines WHERE product_id = %s AND user_id = %s", self.product.product_id, user_id
        )
        process = process_of(self.world.platform, str(engine_id))
        assert process is not None
        process.kill()

        def back() -> bool:
            again = process_of(self.world.platform, str(engine_id))
            rows = self.world.platform.query(
                "SELECT 1 FROM engines WHERE engine_id = %s AND status = 'running' AND NOT EXISTS"
                " (SELECT FROM operations o WHERE o.engine_id = engines.engine_id AND finished_at IS NULL)",
                engine_id,
            )
            return again is not None and again != process and bool(rows)

        eventually(back, "the engine is back")
        self.check()

    @rule()
    def kill_provisioner(self) -> None:
        self.world.restart_provisioner()
        self.check()

    def check(self) -> None:
        """The registry, the processes and the ports say what the model says."""
        platform = self.world.platform
        rows = dict(
            platform.query("SELECT user_id, status FROM engines WHERE product_id = %s", self.product.product_id)
        )
        assert rows == {user_id: status for user_id, status in self.statuses.items() if status != "none"}
        processes = {
            process.environ()["SEPTEMBER_ENGINE_ID"]: process.status() == psutil.STATUS_STOPPED
            for process in platform.engine_processes()
        }
        expected = platform.query("SELECT engine_id::text, status FROM engines WHERE status IN ('running', 'sleeping')")
        assert processes == {engine_id: status == "sleeping" for engine_id, status in expected}
        ports, engines = (
            platform.query("SELECT count(*) FROM port_leases"),
            platform.query("SELECT count(*) FROM engines"),
        )
        assert ports == engines

    def teardown(self) -> None:
        for user_id in self.statuses:
            with suppress(grpc.aio.AioRpcError):
                self.world.run(self.user(user_id).call("Destroy"))


@pytest.fixture
def world(postgres_url: str, tmp_path: Path) -> Iterator[World]:
    platform = Platform(new_database(postgres_url), tmp_path)
    world = World(platform)
    yield world
    world.close()
    platform.close()


def test_any_sequence_of_calls_and_deaths_follows_the_model(world: World) -> None:
    machine = type("Machine", (LifeCycle,), {"world": world})
    run_state_machine_as_test(machine, settings=CHAOS)
