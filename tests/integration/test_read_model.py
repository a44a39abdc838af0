"""What Admission remembers is never older than it may be, whatever is lost on the way."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import grpc
import psycopg
import pytest

from september.admission.v1 import admission_service_pb2 as pb
from september.engine.v1 import denial_pb2
from september.provisioner.v1 import product_service_pb2 as product_pb
from services.admission.domain import Engine
from services.admission.read_model import ReadModel
from services.admission.registry_sql import SqlRegistry
from services.provisioner.store.migrations import migrate
from services.shared.errors import Unavailable
from services.shared.keys import EngineKeyring, new_platform_key, platform_key_hash
from services.shared.postgres import Database
from tests.harness import Clients, Platform, Product, Service, eventually, reason, retry_after_s
from tests.integration.test_life_cycle import User

pytestmark = pytest.mark.early(20)

Connect = Callable[..., Clients]
REASON = denial_pb2.Denial.Reason
# As old as anything may be that Admission knows.
OLDEST_S = 5.0


@contextmanager
def gone(platform: Platform) -> Iterator[psycopg.Connection[Any]]:
    """PostgreSQL serves this database to nobody within the block, but for the connection that it gives."""
    with psycopg.connect(platform.database_url, autocommit=True) as inside:
        name = inside.info.dbname
        other = platform.database_url.replace(f"/{name}?", "/postgres?")
        with psycopg.connect(other, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s",
                [name, inside.info.backend_pid],
            )
            try:
                yield inside
            finally:
                connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())


class Known:
    """A user whose running engine two Admissions know, and how they answer."""

    def __init__(self, clients: Clients, product: Product) -> None:
        self.clients = clients
        self.user = User(clients, product)

    async def answers(self) -> set[str]:
        answers = set()
        for admission in self.clients.admissions:
            try:
                answer = await admission.Admit(
                    pb.AdmitRequest(user_id=self.user.user_id), metadata=self.user.product.metadata
                )
                answers.add("admitted" if answer.admitted else REASON.Name(answer.reason))
            except grpc.aio.AioRpcError as error:
                answers.add(reason(error))
        return answers

    async def within(self, seconds: float, answer: str) -> None:
        """All of them come to answer so."""
        begun = time.monotonic()
        while (answers := await self.answers()) != {answer}:
            assert time.monotonic() - begun < seconds, answers


async def knowing(platform: Platform, clients: Clients) -> Known:
    known = Known(clients, await clients.register())
    assert (await known.user.admit(auto_provision=True)).admitted
    # What they know of its boot they forget once more when they read the feed.
    await asyncio.to_thread(platform.replicas_know)
    assert await known.answers() == {"admitted"}
    return known


@pytest.fixture
async def known(platform: Platform, connect: Connect) -> Known:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner, platform.admission(provisioner), platform.admission(provisioner))
    return await knowing(platform, clients)


async def test_nothing_is_remembered_of_a_registry_that_was_restored(known: Known, platform: Platform) -> None:
    with psycopg.connect(platform.database_url) as connection:
        connection.execute("SET session_replication_role = replica")  # A dump tells no feed what was in it.
        connection.execute("UPDATE engines SET status = 'stopped'")
    await asyncio.to_thread(platform.replicas_know)
    assert await known.answers() == {"admitted"}
    platform.query("UPDATE installation SET incarnation = gen_random_uuid()")
    await known.within(OLDEST_S, "engine_sleeping")


async def destroy(known: Known) -> str:
    await known.user.call("Destroy")
    return "engine_not_found"


async def stop(known: Known) -> str:
    await known.user.call("Stop")
    return "engine_sleeping"


async def revoke(known: Known) -> str:
    request = product_pb.RotatePlatformKeyRequest(product_id=known.user.product.product_id, grace_s=0)
    await known.clients.products.RotatePlatformKey(request, metadata=known.clients.admin)
    return "INVALID_PLATFORM_KEY"


async def disable(known: Known) -> str:
    request = product_pb.DisableProductRequest(product_id=known.user.product.product_id)
    await known.clients.products.DisableProduct(request, metadata=known.clients.admin)
    return "INVALID_PLATFORM_KEY"


async def tighten(known: Known) -> str:
    request = product_pb.UpdatePolicyRequest(product_id=known.user.product.product_id)
    request.policy.update({"max_engines": 1, "rate_limit_rpm": 1})
    await known.clients.products.UpdatePolicy(request, metadata=known.clients.admin)
    return "RATE_LIMITED"


@pytest.mark.parametrize("notified", [True, False], ids=["notified", "mute"])
@pytest.mark.parametrize("change", [destroy, stop, revoke, disable, tighten])
async def test_a_change_is_known_within_seconds(
    known: Known, platform: Platform, change: Callable[[Known], Awaitable[str]], *, notified: bool
) -> None:
    if not notified:
        platform.lose_notifications()
    answer = await change(known)
    await known.within(OLDEST_S, answer)


async def test_once_an_engine_is_put_to_sleep_nobody_admits_to_it(known: Known, platform: Platform) -> None:
    platform.lose_notifications()
    await known.user.sleep()
    assert await known.answers() == {"engine_sleeping"}


async def test_an_engine_that_is_made_by_another_call_is_found_in_time(known: Known, platform: Platform) -> None:
    platform.lose_notifications()
    other = Known(known.clients, known.user.product)
    other.user.user_id = "other"
    assert await other.answers() == {"engine_not_found"}
    await other.user.call("Provision")
    await other.within(OLDEST_S, "admitted")


async def test_without_the_registry_running_engines_are_admitted_to_and_nobody_waits(
    platform: Platform, connect: Connect
) -> None:
    provisioner = platform.provisioner(ORCH_STALE_OK_S="7")
    admissions = [platform.admission(provisioner, ORCH_STALE_OK_S="7") for _ in range(2)]
    known = await knowing(platform, connect(platform, provisioner, *admissions))
    stranger = Known(known.clients, known.user.product)
    stranger.user.user_id = "stranger"
    with gone(platform):
        begun = time.monotonic()
        await stranger.within(OLDEST_S, "UNAVAILABLE")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stranger.user.admit(auto_provision=True)
        assert reason(error.value) == "UNAVAILABLE"
        assert retry_after_s(error.value) > 0
        while time.monotonic() - begun < 4:
            assert await known.answers() == {"admitted"}
            assert await stranger.answers() == {"UNAVAILABLE"}
        await known.within(10, "UNAVAILABLE")
    await known.within(15, "admitted")
    await stranger.within(15, "engine_not_found")


async def test_what_changes_while_the_registry_is_gone_is_known_when_it_is_back(
    platform: Platform, connect: Connect
) -> None:
    provisioner = platform.provisioner()
    admissions = [platform.admission(provisioner) for _ in range(2)]
    known = await knowing(platform, connect(platform, provisioner, *admissions))
    stranger = Known(known.clients, known.user.product)
    stranger.user.user_id = "stranger"
    with gone(platform) as connection:
        # One whose look-ups fail may not have tried the feed yet, and could miss the outage.
        for admission in admissions:
            await asyncio.to_thread(eventually, partial(noticed, admission), "the outage is noticed")
        await stranger.within(OLDEST_S, "UNAVAILABLE")
        # Nobody is told, not by the feed either: a registry that was restored from a copy.
        connection.execute("SET session_replication_role = replica")
        connection.execute("UPDATE products SET disabled_at = now()")
        assert await known.answers() == {"admitted"}
    await known.within(15, "INVALID_PLATFORM_KEY")


def noticed(admission: Service) -> bool:
    """Whether it has read the change feed in vain."""
    return any(event["event"] == "change_feed_unreachable" for event in admission.events())


class Rig:
    """A read model on a registry of its own, read only when the test says so."""

    def __init__(self, database: Database, url: str) -> None:
        keyring = EngineKeyring(["b2tub3dzLWl0LWlzLW5vdC1hLXNlY3JldC1hdC1hbGw="])
        self.model = ReadModel(SqlRegistry(database, keyring), stale_ok_s=300)
        self.url = url
        self.product_id = uuid4()
        self.key = new_platform_key()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO products (product_id, slug, max_engines, allowed_images) VALUES (%s, 'p', 1, '{}')",
                [self.product_id],
            )
            connection.execute(
                "INSERT INTO platform_keys (key_hash, product_id) VALUES (%s, %s)",
                [platform_key_hash([self.key]), self.product_id],
            )
            for user_id in ("u1", "ü 2"):
                engine_id = uuid4()
                connection.execute(
                    "INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key)"
                    " VALUES (%s, %s, %s, 'running', 'i', 'local', 'before', %s)",
                    [engine_id, self.product_id, user_id, keyring.encrypt(engine_id, "sk")],
                )

    async def urls(self) -> list[str]:
        engines: list[Engine | None] = [await self.model.engine(self.product_id, user_id) for user_id in ("u1", "ü 2")]
        return [engine.url for engine in engines if engine is not None]


@pytest.fixture
async def rig(database_url: str) -> AsyncIterator[Rig]:
    await migrate(database_url)
    database = Database(database_url, application_name="read-model")
    await database.open()
    rig = Rig(database, database_url)
    await rig.model.tick()
    assert await rig.urls() == ["before", "before"]
    yield rig
    await database.close()


async def test_a_change_that_commits_late_is_not_missed(rig: Rig) -> None:
    with psycopg.connect(rig.url) as late, psycopg.connect(rig.url, autocommit=True) as quick:
        late.execute("UPDATE engines SET url = 'late' WHERE user_id = 'u1'")
        quick.execute("UPDATE engines SET url = 'quick' WHERE user_id <> 'u1'")
        for _ in range(3):
            await rig.model.tick()
            assert await rig.urls() == ["before", "quick"]
        late.commit()
        assert await rig.urls() == ["before", "quick"]
        await rig.model.tick()
        assert await rig.urls() == ["late", "quick"]


async def test_what_is_known_is_from_before_no_change_that_was_committed_by_then(rig: Rig) -> None:
    """Whoever puts an engine to sleep rests on this: `known_at` vouches for all that was committed before."""
    with psycopg.connect(rig.url, autocommit=True) as connection:
        for number in range(50):
            connection.execute("UPDATE engines SET url = %s", [str(number)])
            row = connection.execute("SELECT clock_timestamp()").fetchone()
            await rig.model.tick()
            assert row is not None
            assert rig.model.known_at > row[0]
            assert await rig.urls() == [str(number)] * 2


async def test_a_notification_is_enough(rig: Rig, database_url: str) -> None:
    database = Database(database_url, application_name="listener")
    heard: list[str] = []

    def hear(payload: str) -> None:
        heard.append(payload)
        rig.model.hear(payload)

    listener = asyncio.create_task(database.listen("changes", hear))
    await asyncio.to_thread(eventually, lambda: heard == [""], "it listens")
    with psycopg.connect(rig.url, autocommit=True) as connection:
        connection.execute("UPDATE engines SET url = 'after'")
        await asyncio.to_thread(eventually, lambda: len(heard) == 3, "it was told")
        assert await rig.urls() == ["after", "after"]
        assert (await rig.model.product_by_key(platform_key_hash([rig.key]))) is not None
        connection.execute("UPDATE products SET disabled_at = now()")
        await asyncio.to_thread(eventually, lambda: heard[3:] == [str(rig.product_id)], "it was told")
        assert await rig.model.product_by_key(platform_key_hash([rig.key])) is None
        connection.execute("UPDATE engines SET last_health_at = now(), health_failures = 1, busy_at = now()")
        connection.execute("DELETE FROM engines")
        await asyncio.to_thread(eventually, lambda: len(heard) == 6, "it was told")
        assert await rig.urls() == []
    listener.cancel()


async def test_admits_of_a_running_engine_write_nothing_and_notify_nobody(known: Known, platform: Platform) -> None:
    """But for what is said of all of them together, some times a second, by the limiter and the log of use."""
    platform.query("UPDATE products SET rate_limit_rpm = 100000")
    await asyncio.to_thread(platform.replicas_know)
    heard: list[psycopg.Notify] = []
    with psycopg.connect(platform.database_url, autocommit=True) as connection:
        connection.add_notify_handler(heard.append)
        for channel in ("changes", "operations", "steps"):
            connection.execute(f"LISTEN {channel}".encode())

        def counted() -> Any:
            """Changes noted, transactions that wrote, and all; the last may be late by a second."""
            return connection.execute(
                "SELECT (SELECT count(*) FROM changes), pg_snapshot_xmax(pg_current_snapshot())::text::bigint,"
                " xact_commit FROM pg_stat_database WHERE datname = current_database()"
            ).fetchone()

        begun, (changes, written, committed) = time.monotonic(), counted()
        for _ in range(20):
            answers = await asyncio.gather(*(known.user.admit() for _ in range(100)))
            assert all(answer.admitted for answer in answers)
        # By then it would have been counted what each has done.
        await asyncio.to_thread(platform.replicas_know)
        seconds, after = time.monotonic() - begun, counted()
        assert (after[0], heard) == (changes, [])
        # The limiter asks for a share of many at once.
        assert after[1] - written < 2000 / 20 + 20 * seconds
        assert after[2] - committed < 2000 / 20 + 60 * seconds
        await known.user.call("Stop")
        assert counted()[0] > changes
        assert {notify.channel for notify in heard} == {"changes", "operations", "steps"}


async def test_of_many_changes_each_is_applied_once(rig: Rig) -> None:
    with psycopg.connect(rig.url) as late, psycopg.connect(rig.url, autocommit=True) as quick:
        late.execute("UPDATE products SET max_engines = 2")  # Its transaction stays open.
        quick.execute("UPDATE engines SET url = 'after'")
        await rig.model.tick()
        engine = await rig.model.engine(rig.product_id, "u1")
        for _ in range(3):
            await rig.model.tick()
            assert await rig.model.engine(rig.product_id, "u1") is engine


async def test_one_unreadable_key_hurts_nobody_else(rig: Rig) -> None:
    with psycopg.connect(rig.url, autocommit=True) as connection:
        connection.execute("UPDATE engines SET encrypted_key = 'nonsense' WHERE user_id = 'u1'")
    await rig.model.tick()
    bad, good = await asyncio.gather(
        rig.model.engine(rig.product_id, "u1"), rig.model.engine(rig.product_id, "ü 2"), return_exceptions=True
    )
    assert isinstance(bad, Exception)
    assert not isinstance(bad, Unavailable)
    assert isinstance(good, Engine)


async def test_foreign_ids_are_not_found(rig: Rig) -> None:
    assert await rig.model.engine(UUID(int=0), "u1") is None
    assert await rig.model.engine_now(UUID(int=0), "u1") is None
