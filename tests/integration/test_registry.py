"""The registry's schema and the guarantees that PostgreSQL itself gives."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from services.provisioner.store.migrations import migrate
from services.shared.errors import Unavailable
from services.shared.postgres import Database
from tests.harness import eventually

TAKE = "SELECT take_token(%s, %s, make_interval(secs => 60))"


def columns(url: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns"
            " WHERE table_schema = 'public' ORDER BY 1, 2"
        ).fetchall()


async def test_many_that_migrate_at_once_apply_each_migration_once(database_url: str) -> None:
    applied = await asyncio.gather(*(migrate(database_url) for _ in range(8)))
    done = [names for names in applied if names]
    assert len(done) == 1
    assert done[0] == sorted(done[0])
    schema = columns(database_url)
    assert await migrate(database_url) == []
    assert columns(database_url) == schema


async def test_an_unreachable_database_says_so_and_nothing_of_the_inside() -> None:
    with pytest.raises(Unavailable, match=r"^the registry can't be reached$"):
        await migrate("postgresql://nobody:secret@127.0.0.1:1/none")


async def test_a_lost_connection_is_replaced(database_url: str) -> None:
    database = Database(database_url, application_name="test", max_size=2)
    await database.open()
    try:
        async with database.connection() as connection:
            cursor = await connection.execute("SELECT pg_backend_pid() AS pid")
            before = await cursor.fetchone()
        with psycopg.connect(database_url, autocommit=True) as killer:
            killer.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'test'")
        async with database.connection() as connection:
            cursor = await connection.execute("SELECT pg_backend_pid() AS pid")
            assert await cursor.fetchone() != before
    finally:
        await database.close()


async def test_a_listener_hears_and_reconnects(database_url: str) -> None:
    database = Database(database_url, application_name="test")
    heard = asyncio.Event()
    listener = asyncio.create_task(database.listen("news", lambda _: heard.set()))

    async def hears() -> None:
        async with asyncio.timeout(10):
            await heard.wait()
        heard.clear()

    await hears()
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("NOTIFY news")
        await hears()
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'test' AND query LIKE 'LISTEN%'"
        )
        await hears()
        connection.execute("NOTIFY news")
        await hears()
    listener.cancel()
    await asyncio.wait([listener])


@pytest.fixture
async def limited(database_url: str) -> UUID:
    """A product with a limiter."""
    await migrate(database_url)
    product_id = uuid4()
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO products (product_id, slug, max_engines, allowed_images) VALUES (%s, 'p', 1, '{}')",
            [product_id],
        )
        connection.execute("INSERT INTO rate_limiters (product_id) VALUES (%s)", [product_id])
    return product_id


async def take(url: str, product_id: UUID, limit: int) -> float | None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        cursor = await connection.execute(TAKE, [product_id, limit])
        row = await cursor.fetchone()
        assert row is not None
        wait: float | None = row[0]
        return wait


async def test_tokens_taken_at_once_never_exceed_the_limit(database_url: str, limited: UUID) -> None:
    waits = await asyncio.gather(*(take(database_url, limited, 20) for _ in range(50)))
    assert sum(wait is None for wait in waits) == 20


async def test_a_grant_is_dated_after_the_wait_for_the_lock(database_url: str, limited: UUID) -> None:
    """A grant dated to before its wait would leave the window too early."""
    with psycopg.connect(database_url) as holder:
        holder.execute("SELECT 1 FROM rate_limiters WHERE product_id = %s FOR UPDATE", [limited])
        waiting = asyncio.create_task(take(database_url, limited, 1))
        with psycopg.connect(database_url, autocommit=True) as observer:
            await asyncio.to_thread(
                eventually,
                lambda: observer.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall(),
                "the other waits for the lock",
            )
            released = observer.execute("SELECT clock_timestamp()").fetchone()
        holder.commit()
        assert await waiting is None
        granted = holder.execute("SELECT granted_at FROM rate_grants").fetchone()
    assert granted is not None
    assert released is not None
    assert granted[0] >= released[0]


async def test_time_does_not_go_back_for_the_limiter(database_url: str, limited: UUID) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        # As after a step of the host's clock: the last grant lies ahead of the clock.
        connection.execute("UPDATE rate_limiters SET last_at = clock_timestamp() + interval '30 s'")
        assert await take(database_url, limited, 1) is None
        ahead = connection.execute("SELECT granted_at > clock_timestamp() + interval '20 s' FROM rate_grants")
        assert ahead.fetchone() == (True,)
    wait = await take(database_url, limited, 1)
    assert wait is not None
    assert 59 < wait <= 60


async def test_a_changed_limit_holds_at_once_and_old_grants_are_let_go(database_url: str, limited: UUID) -> None:
    for _ in range(5):
        assert await take(database_url, limited, 10) is None
    assert await take(database_url, limited, 5) is not None
    assert await take(database_url, limited, 6) is None
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE rate_grants SET granted_at = granted_at - interval '61 s'")
        for _ in range(6):
            assert await take(database_url, limited, 6) is None
        kept = connection.execute("SELECT count(*) FROM rate_grants").fetchone()
    assert kept == (6,)
    assert await take(database_url, limited, 6) is not None
