"""PostgreSQL restarted, gone, full, closed: running engines are admitted, and nobody waits in vain."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest

from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from services.shared.errors import Unavailable
from services.shared.postgres import Database
from tests.chaos.outage import AT_ONCE_S, RECOVERY_S, Callers, during
from tests.chaos.own_postgres import OwnPostgres, own_postgres
from tests.chaos.score_card import Score
from tests.e2e.gateway_process import Gateway, Inside, running_gateway
from tests.harness import Clients, Platform, Product, Service, running_platform

Connect = Callable[..., Clients]
Extent = Callable[[int, int], int]
Installed = tuple[OwnPostgres, Platform, Service, Service, Product]

# More than the five minutes of the longest outage, by what it takes to reach PostgreSQL again.
STALE_OK_S = 330
RESTART = "PostgreSQL restart: recovery; requests past their deadline"
GONE = "PostgreSQL gone for 5 min: admits of running engines that fail"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """A platform on a PostgreSQL of its own, which works again after each test."""
    settings = {"ORCH_PORT_MIN": "22000", "ORCH_PORT_MAX": "22499", "ORCH_STALE_OK_S": str(STALE_OK_S)}
    with (
        own_postgres(megabytes=300) as postgres,
        running_platform(postgres.url, tmp_path_factory.mktemp("outage"), **settings) as platform,
    ):
        provisioner = platform.provisioner()
        admission = platform.admission(provisioner)

        async def register() -> Product:
            clients = Clients(platform, provisioner.address)
            product = await clients.register(max_engines=400)
            await clients.close()
            return product

        yield postgres, platform, provisioner, admission, asyncio.run(register())


@pytest.fixture
async def callers(installed: Installed, connect: Connect) -> Callers:
    _, platform, provisioner, admission, product = installed
    clients = connect(platform, provisioner, admission)
    callers = Callers(platform, clients, product, [clients.admission])
    await callers.open()
    return callers


@asynccontextmanager
async def both_hosts(callers: Callers, installed: Installed, directory: Path) -> AsyncIterator[tuple[Gateway, Callers]]:
    """The same with another Admission beside, inside of the gateway."""
    _, platform, provisioner, *_ = installed
    environment = {**platform.environment, "ORCH_PROVISIONER_ADDR": provisioner.address}
    async with (
        running_gateway(directory, Inside("services.admission.lane:app", environment), provisioner.address) as gateway,
        grpc.aio.insecure_channel(gateway.address) as channel,
    ):
        stubs = [callers.clients.admission, AdmissionServiceStub(channel)]
        both = Callers(platform, callers.clients, callers.product, stubs)
        await both.open()
        yield gateway, both


@pytest.mark.parametrize("end", [pytest.param(OwnPostgres.stop, marks=pytest.mark.long), OwnPostgres.kill])
@pytest.mark.figure(RESTART)
async def test_a_restart_is_over_within_seconds_and_no_call_waits_past_its_deadline(
    callers: Callers, installed: Installed, score: Score, end: Callable[[OwnPostgres], None]
) -> None:
    postgres = installed[0]
    async with callers.load(100) as running, callers.load(20, "nobody") as others:
        await others.goes_on()
        await asyncio.to_thread(end, postgres)
        await others.goes_on()
        await asyncio.to_thread(postgres.start)
        recovery_s = await callers.recovery_s()
    late = (running.outcomes() + others.outcomes())["DEADLINE_EXCEEDED"]
    met = recovery_s <= RECOVERY_S and not late
    score(RESTART, f"{recovery_s:.1f} s; {late}", met)
    assert running.outcomes().keys() == {"admitted"}
    assert others.outcomes().keys() <= {"engine_not_found", "UNAVAILABLE"}


@pytest.mark.early(310)
@pytest.mark.figure(GONE)
async def test_without_postgresql_running_engines_are_admitted_and_a_new_user_is_told_at_once(
    callers: Callers, installed: Installed, tmp_path: Path, score: Score, extent: Extent
) -> None:
    async with both_hosts(callers, installed, tmp_path) as (gateway, both), both.load(200) as running:
        begun = time.monotonic()
        async with during(installed[0].gone()):
            while time.monotonic() < begun + extent(2, 300):
                answers = await both.ask()
                assert {answer.outcome for answer in answers.values()} == {"UNAVAILABLE"}
                admits = [answer.took_s for name, answer in answers.items() if name.startswith("admit")]
                assert max(admits) < AT_ONCE_S
                answer = await gateway.rest(
                    "POST",
                    "/engines/new/admit",
                    json.dumps({"auto_provision": True}).encode(),
                    [("x-platform-key", both.product.key)],
                )
                assert answer.error()[:2] == (503, "UNAVAILABLE")
                assert answer.header("retry-after") == "1"
                await asyncio.sleep(0.5)
        await both.recovery_s()
    failed = running.outcomes().total() - running.outcomes()["admitted"]
    score(GONE, f"{failed} (ORCH_STALE_OK_S={STALE_OK_S})", not failed)
    assert not failed


@pytest.mark.parametrize(
    "outage",
    [
        OwnPostgres.full,
        OwnPostgres.read_only,
        pytest.param(OwnPostgres.crowded, marks=pytest.mark.long),
        pytest.param(OwnPostgres.hung, marks=pytest.mark.long),
    ],
)
async def test_in_an_outage_running_engines_are_admitted_and_whoever_wants_more_is_told_in_time(
    callers: Callers, installed: Installed, outage: Callable[[OwnPostgres], AbstractContextManager[None]]
) -> None:
    async with callers.load(50) as running:
        async with during(outage(installed[0])):
            await callers.told()
        await callers.recovery_s()
    assert running.outcomes().keys() == {"admitted"}


@pytest.mark.long
async def test_connections_that_were_ended_are_replaced(callers: Callers, installed: Installed) -> None:
    async with callers.load(50) as running:
        for _ in range(10):
            await asyncio.to_thread(installed[0].disconnect)
            assert {answer.outcome for answer in (await callers.ask()).values()} <= {"OK", "admitted", "UNAVAILABLE"}
        await callers.recovery_s()
    assert running.outcomes().keys() == {"admitted"}


@pytest.mark.long
async def test_however_many_have_waited_in_vain_the_pool_finds_back() -> None:
    with own_postgres() as postgres:
        database = Database(postgres.url, application_name="waits")
        await database.open()

        async def call() -> None:
            async with database.connection() as connection:
                await connection.execute("SELECT 1")

        postgres.stop()
        answers = await asyncio.gather(*(call() for _ in range(3_000)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {Unavailable}
        postgres.start()
        async with asyncio.timeout(RECOVERY_S):
            while True:
                with suppress(Unavailable):
                    await call()
                    break
                await asyncio.sleep(0.05)
        await database.close()


async def test_whoever_is_cancelled_as_a_connection_comes_is_cancelled(database_url: str) -> None:
    """A loop that went on would keep its process from ending."""
    database = Database(database_url, application_name="cancelled", max_size=1)
    await database.open()

    async def hold(until: asyncio.Event) -> None:
        async with database.connection():
            await until.wait()

    async def steps(count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    for later in range(30):
        given_back = asyncio.Event()
        holding = asyncio.create_task(hold(given_back))
        await steps(20)
        waiting = asyncio.create_task(hold(asyncio.Event()))
        await steps(20)
        given_back.set()
        await steps(later)
        waiting.cancel()
        await asyncio.wait([holding, waiting], timeout=5)
        assert waiting.cancelled(), f"cancelled {later} steps later"
    async with asyncio.timeout(5), database.connection():
        pass
    await database.close()


async def test_cancelled_calls_leave_the_pool_as_it_was(database_url: str, seed: int, extent: Extent) -> None:
    size = 4
    chance = random.Random(seed)
    database = Database(database_url, application_name="cancelled", max_size=size)
    await database.open()

    async def call() -> int:
        async with database.connection() as connection:
            cursor = await connection.execute("SELECT pg_backend_pid() FROM pg_sleep(0.002)")
            row = await cursor.fetchone()
        assert row is not None
        return int(row["pg_backend_pid"])

    async def cancelled() -> None:
        with suppress(TimeoutError, Unavailable):
            async with asyncio.timeout(chance.random() * 0.01):
                await call()

    for _ in range(extent(20, 500)):
        await asyncio.gather(*(cancelled() for _ in range(20)))
    all_at_once = asyncio.Barrier(size)

    async def held() -> int:
        async with database.connection() as connection:
            async with asyncio.timeout(5):
                await all_at_once.wait()
            return connection.info.backend_pid

    assert len(set(await asyncio.gather(*(held() for _ in range(size))))) == size
    async with database.connection() as connection:
        cursor = await connection.execute("SELECT 1 FROM pg_stat_activity WHERE application_name = 'cancelled'")
        assert len(await cursor.fetchall()) == size
    await database.close()
