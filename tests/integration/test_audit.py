"""The registry's own house: an audit log that is only added to, its months, its denials; counts; leases of loops."""

import asyncio
from collections.abc import Callable
from importlib.resources import files
from threading import Event
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from cryptography.fernet import Fernet

from services.provisioner.loops.housekeeping import Housekeeping
from services.provisioner.store.audit import AuditStore
from services.provisioner.store.feed import FeedStore
from services.provisioner.store.fleet import FleetStore
from services.provisioner.store.idempotency import IdempotencyStore
from services.provisioner.store.migrations import migrate
from services.shared.errors import Unavailable
from services.shared.keys import EngineKeyring
from services.shared.postgres import Database
from tests.harness import Platform, eventually

Query = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def query(database: Database, database_url: str) -> Query:
    def query(sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(database_url, autocommit=True) as connection:
            cursor = connection.execute(sql.encode(), parameters)
            return cursor.fetchall() if cursor.description is not None else []

    return query


def add_product(query: Query, slug: str = "demo") -> UUID:
    product_id = uuid4()
    query(
        "INSERT INTO products (product_id, slug, max_engines, allowed_images) VALUES (%s, %s, 100, '{}')",
        product_id,
        slug,
    )
    return product_id


def add_event(query: Query, product_id: UUID, at: str = "clock_timestamp()", action: str = "start") -> None:
    query(
        "INSERT INTO audit_events (at, action, actor, outcome, product_id)"
        f" VALUES ({at}, %s, 'system', 'succeeded', %s)",
        action,
        product_id,
    )


def months(query: Query) -> list[tuple[str, int]]:
    """The partitions that have events, and how many."""
    return query("SELECT tableoid::regclass::text, count(*) FROM audit_events GROUP BY 1 ORDER BY 1")


def housekeeping(database: Database, *, days: int = 400) -> Housekeeping:
    return Housekeeping(
        AuditStore(database),
        FleetStore(database),
        FeedStore(database),
        IdempotencyStore(database, EngineKeyring([Fernet.generate_key().decode()])),
        audit_retention_days=days,
    )


@pytest.mark.parametrize("table", ["audit_events", "audit_events_other", "of this month"])
@pytest.mark.parametrize("change", ["UPDATE {} SET actor = 'nobody'", "DELETE FROM {}", "TRUNCATE {}"])
def test_what_is_written_is_neither_changed_nor_removed(query: Query, table: str, change: str) -> None:
    product_id = add_product(query)
    add_event(query, product_id)
    add_event(query, product_id, at="'1999-01-01'")
    if table == "of this month":
        table = query("SELECT tableoid::regclass::text FROM audit_events ORDER BY at DESC LIMIT 1")[0][0]
    before = query("SELECT * FROM audit_events ORDER BY event_id")
    with pytest.raises(psycopg.errors.RaiseException, match="the audit log is only added to"):
        query(change.format(table))
    assert query("SELECT * FROM audit_events ORDER BY event_id") == before


def test_an_event_lands_in_its_month(query: Query) -> None:
    product_id = add_product(query)
    add_event(query, product_id)
    add_event(query, product_id, at="date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC') + interval '1 month'")
    names = query(
        "SELECT 'audit_events_' || to_char((clock_timestamp() AT TIME ZONE 'UTC')"
        " + make_interval(months => i), 'YYYY_MM') FROM generate_series(0, 1) AS i"
    )
    assert months(query) == sorted((name, 1) for (name,) in names)


async def test_events_of_a_month_that_was_forgotten_move_into_it(query: Query, database: Database) -> None:
    product_id = add_product(query)
    for at in ("'2020-02-29 23:59:59.999999Z'", "'2020-03-01 00:00:00Z'", "'2020-03-31Z'"):
        add_event(query, product_id, at=at, action="destroy")
    before = query("SELECT * FROM audit_events ORDER BY event_id")
    counts = query("SELECT name, sum(n) FROM counts GROUP BY name")
    assert months(query) == [("audit_events_other", 3)]

    made = await asyncio.gather(*(AuditStore(database).make_partitions() for _ in range(4)))
    assert sorted(name for names in made for name in names) == ["audit_events_2020_02", "audit_events_2020_03"]
    assert months(query) == [("audit_events_2020_02", 1), ("audit_events_2020_03", 2)]
    assert query("SELECT * FROM audit_events ORDER BY event_id") == before
    assert query("SELECT name, sum(n) FROM counts GROUP BY name") == counts
    for change in ("DELETE FROM audit_events_2020_02", "TRUNCATE audit_events_2020_02", "DELETE FROM audit_events"):
        with pytest.raises(psycopg.errors.RaiseException):
            query(change)


async def test_a_month_is_made_under_its_writers(query: Query, database: Database, database_url: str) -> None:
    """The month that is and has no partition: after a step of the clock, or a month without a Provisioner."""
    product_id = add_product(query)
    month = query("SELECT 'audit_events_' || to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY_MM')")[0][0]
    query("CREATE TABLE detached (LIKE audit_events)")
    done = Event()

    def write() -> int:
        written = 0
        with psycopg.connect(database_url, autocommit=True) as connection:
            while not done.is_set():
                connection.execute(
                    "INSERT INTO audit_events (action, actor, outcome, product_id)"
                    " VALUES ('start', 'system', 'requested', %s)",
                    [product_id],
                )
                written += 1
        return written

    writers = [asyncio.create_task(asyncio.to_thread(write)) for _ in range(4)]
    try:
        for _ in range(20):
            query(f"ALTER TABLE audit_events DETACH PARTITION {month}")
            query(f"INSERT INTO detached SELECT * FROM {month}")
            query(f"DROP TABLE {month}")
            assert await AuditStore(database).make_partitions() == [month]
    finally:
        done.set()
        written = await asyncio.gather(*writers)
    [(kept,)] = query("SELECT (SELECT count(*) FROM detached) + (SELECT count(*) FROM audit_events)")
    assert kept == sum(written) > 0
    assert "audit_events_other" not in [name for name, _ in months(query)]


async def test_a_month_is_dropped_once_all_of_it_is_too_old(query: Query, database: Database) -> None:
    product_id = add_product(query)
    now = "date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'"
    for age in (1, 2, 3):
        add_event(query, product_id, at=f"{now} - interval '{age} months'")
    audit = AuditStore(database)
    await audit.make_partitions()
    days_of_this_month = int(query(f"SELECT extract(day FROM clock_timestamp() - {now})")[0][0])
    # The last month has ended as many days ago; the one before it a month earlier.
    kept = days_of_this_month + 1
    dropped = await audit.drop_partitions(kept)
    assert len(dropped) == 2
    assert [count for _, count in months(query)] == [1]
    assert await audit.drop_partitions(kept) == []
    assert query("SELECT count(*) FROM audit_events WHERE at < clock_timestamp() - interval '70 days'") == [(0,)]


async def test_a_writer_in_the_way_postpones_the_dropping_and_nothing_else(
    query: Query, database: Database, database_url: str
) -> None:
    product_id = add_product(query)
    add_event(query, product_id, at="'2020-02-01Z'")
    deny(query, product_id, minutes_ago=5, denials=2)
    with psycopg.connect(database_url) as writer:
        writer.execute(
            "INSERT INTO audit_events (action, actor, outcome, product_id) VALUES ('start', 'a', 'requested', %s)",
            [product_id],
        )
        await housekeeping(database).tick()
        assert ("audit_events_2020_02", 1) in months(query)
        assert query("SELECT count FROM audit_events WHERE action = 'admit_denied'") == [(2,)]
        with pytest.raises(Unavailable):
            await AuditStore(database).drop_partitions(400)
        writer.commit()
    await housekeeping(database).tick()
    assert ("audit_events_2020_02", 1) not in months(query)


async def test_events_from_before_the_months_are_kept(database_url: str) -> None:
    """An installation of the version before, with a past."""
    folder = files("services.provisioner") / "sql" / "migrations"
    product_id = uuid4()
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE schema_migrations (name text PRIMARY KEY, applied_at timestamptz)")
        for name in ("0001_registry.sql", "0002_rate_limit.sql"):
            connection.execute((folder / name).read_bytes())
            connection.execute("INSERT INTO schema_migrations VALUES (%s, clock_timestamp())", [name])
        connection.execute(
            "INSERT INTO products (product_id, slug, max_engines, allowed_images) VALUES (%s, 'demo', 1, '{}')",
            [product_id],
        )
        connection.execute(
            "INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key)"
            " VALUES (gen_random_uuid(), %s, 'u1', 'running', 'i', 'n', '', '')",
            [product_id],
        )
        for at in ("2020-02-01Z", "2020-03-01Z"):
            connection.execute(
                "INSERT INTO audit_events (at, action, actor, outcome, product_id)"
                " VALUES (%s, 'provision', 'product:demo', 'succeeded', %s)",
                [at, product_id],
            )
        await migrate(database_url)
        events = connection.execute(
            "SELECT event_id, tableoid::regclass::text, product_id FROM audit_events ORDER BY event_id"
        ).fetchall()
        counts = connection.execute("SELECT name, n FROM counts ORDER BY name").fetchall()
    assert events == [(1, "audit_events_2020_02", product_id), (2, "audit_events_2020_03", product_id)]
    assert counts == [("engines:running", 1), ("provision", 2)]


def deny(query: Query, product_id: UUID, *, minutes_ago: int, denials: int, reason: str = "engine_sleeping") -> None:
    query(
        "INSERT INTO admit_denials (product_id, reason, minute, denials)"
        " SELECT %s, %s, date_trunc('minute', clock_timestamp()) - make_interval(mins => %s), %s",
        product_id,
        reason,
        minutes_ago,
        denials,
    )


async def test_denials_become_one_event_of_each_product_reason_and_minute(query: Query, database: Database) -> None:
    demo, other = add_product(query), add_product(query, "other")
    deny(query, demo, minutes_ago=5, denials=7)
    deny(query, demo, minutes_ago=4, denials=1)
    deny(query, demo, minutes_ago=4, denials=3, reason="engine_not_found")
    deny(query, other, minutes_ago=4, denials=2)
    # Those who counted these may still have more to tell.
    deny(query, demo, minutes_ago=1, denials=9)
    await asyncio.gather(*(AuditStore(database).record_denials() for _ in range(4)))
    events = query(
        "SELECT actor, outcome, detail, count, extract(epoch FROM date_trunc('minute', clock_timestamp()) - at) / 60"
        " FROM audit_events WHERE action = 'admit_denied' ORDER BY 1, 5 DESC, 3"
    )
    assert [(*event[:4], round(event[4])) for event in events] == [
        ("product:demo", "denied", "engine_sleeping", 7, 5),
        ("product:demo", "denied", "engine_not_found", 3, 4),
        ("product:demo", "denied", "engine_sleeping", 1, 4),
        ("product:other", "denied", "engine_sleeping", 2, 4),
    ]
    assert query("SELECT denials FROM admit_denials") == [(9,)]


async def test_counts_stay_exact_while_they_are_folded(query: Query, database: Database, database_url: str) -> None:
    product_ids = [add_product(query, f"p{i}") for i in range(3)]
    fleet = FleetStore(database)
    done = asyncio.Event()

    async def count(product_id: UUID) -> None:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            for i in range(200):
                await connection.execute(
                    "INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key)"
                    " VALUES (gen_random_uuid(), %s, %s, 'provisioning', 'i', 'n', '', '')",
                    [product_id, f"u{i}"],
                )
                user = [product_id, f"u{i}"]
                await connection.execute(
                    "UPDATE engines SET status = 'running' WHERE product_id = %s AND user_id = %s", user
                )
                if i % 4 == 0:
                    await connection.execute("DELETE FROM engines WHERE product_id = %s AND user_id = %s", user)

    async def fold() -> None:
        while not done.is_set():
            await fleet.fold_counts()

    async def read() -> None:
        """At no moment is a count more or less than what is there."""
        while not done.is_set():
            async with database.transaction() as tx:
                await tx.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor = await tx.execute(
                    "SELECT (SELECT count(*) FROM engines) AS engines,"
                    " (SELECT coalesce(sum(n), 0) FROM counts WHERE name LIKE 'engines:%') AS counted"
                )
                row = await cursor.fetchone()
                assert row is not None
                assert row["engines"] == row["counted"]

    async with asyncio.TaskGroup() as group:
        others = [group.create_task(work()) for work in (fold, fold, read)]
        await asyncio.gather(*(count(product_id) for product_id in product_ids))
        done.set()
        await asyncio.gather(*others)
    await fleet.fold_counts()
    assert query("SELECT name, n FROM counts") == [("engines:running", 150)] * 3
    assert await fleet.counts(None) == {"engines:running": 450}
    assert await fleet.counts(product_ids[0]) == {"engines:running": 150}


async def test_housekeeping_goes_on_after_the_registry_was_away(
    query: Query, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny(query, add_product(query), minutes_ago=5, denials=1)
    monkeypatch.setattr("services.provisioner.loops.housekeeping._PERIOD_S", 0.01)
    database = Database(database_url, application_name="test")
    loop = asyncio.create_task(housekeeping(database).run())
    try:
        await asyncio.wait([loop], timeout=0.1)
        await database.open()
        await asyncio.to_thread(
            eventually, lambda: query("SELECT count(*) FROM admit_denials") == [(0,)], "the denials are events"
        )
        loop.cancel()
        await asyncio.wait([loop])
        assert loop.cancelled()
    finally:
        await database.close()


async def test_a_running_provisioner_keeps_the_house(platform: Platform) -> None:
    await migrate(platform.database_url)
    deny(platform.query, add_product(platform.query), minutes_ago=5, denials=4)
    provisioner = platform.provisioner()
    counted = "SELECT count FROM audit_events WHERE action = 'admit_denied'"
    eventually(lambda: platform.query(counted) == [(4,)], "the denials are an event")
    assert provisioner.terminate() == 0
    assert platform.query("SELECT lease_until < clock_timestamp() FROM loop_leases WHERE name = 'housekeeping'") == [
        (True,)
    ]


async def test_operations_are_dropped_when_the_audit_log_has_forgotten_them(query: Query, database: Database) -> None:
    query(
        "INSERT INTO operations (operation_id, engine_id, product_id, user_id, node, kind, actor, created_at,"
        " finished_at, outcome) SELECT gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), user_id, 'local',"
        " 'start', 'system', at, CASE WHEN user_id <> 'open' THEN at END,"
        " CASE WHEN user_id <> 'open' THEN 'succeeded' END"
        " FROM (SELECT 'old' AS user_id, clock_timestamp() - interval '31 days' AS at FROM generate_series(1, 2500)"
        " UNION ALL SELECT 'open', clock_timestamp() - interval '31 days'"
        " UNION ALL SELECT 'young', clock_timestamp() - interval '29 days') AS operations"
    )
    await housekeeping(database, days=30).tick()
    assert query("SELECT user_id FROM operations ORDER BY user_id") == [("open",), ("young",)]
