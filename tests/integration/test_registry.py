"""The registry's schema and the guarantees that PostgreSQL itself gives."""

import asyncio
from importlib.resources import files
from itertools import chain
from typing import Any

import psycopg
import pytest

from services.provisioner.store.migrations import migrate
from services.shared.errors import Unavailable
from services.shared.postgres import Database


def columns(url: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns"
            " WHERE table_schema = 'public' ORDER BY 1, 2"
        ).fetchall()


async def test_many_that_migrate_at_once_apply_each_migration_once(database_url: str) -> None:
    applied = await asyncio.gather(*(migrate(database_url) for _ in range(8)))
    scripts = (files("services.provisioner") / "sql" / "migrations").iterdir()
    assert sorted(chain(*applied)) == sorted(script.name for script in scripts)
    assert all(names == sorted(names) for names in applied)
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
            # Returns once they have ended.
            killer.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'test'"
            )
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
