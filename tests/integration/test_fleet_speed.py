"""What operators and products see of many engines stays as quick with more: told by the plans, not by the clock."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import UUID

import psycopg
import pytest

from services.provisioner.fleet import Fleet
from services.provisioner.store.audit import AuditStore
from services.provisioner.store.fleet import FleetStore
from services.provisioner.store.migrations import migrate
from services.shared.postgres import Connection, Database

ENGINES = 40_000
SMALL_PRODUCTS = 100
EVENTS_1H = 300
LIMIT = 50
# Of 8 KiB, for one statement. The whole of `engines` has over 600, an index of it over 100.
MOST_BLOCKS = 80
BIG = UUID(int=1)

Plan = dict[str, Any]
Call = Callable[[], Awaitable[Any]]


class Explaining:
    """A connection that notes how each of its statements is carried out."""

    def __init__(self, connection: Connection, plans: list[Plan]) -> None:
        self._connection = connection
        self._plans = plans

    async def execute(self, sql: str, values: dict[str, Any] | None = None) -> Any:
        explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}".encode()
        row = await (await self._connection.execute(explain, values)).fetchone()
        assert row is not None
        self._plans.append(row["QUERY PLAN"][0]["Plan"])
        return await self._connection.execute(sql.encode(), values)


class ExplainingDatabase(Database):
    def __init__(self, url: str) -> None:
        super().__init__(url, application_name="test")
        self.plans: list[Plan] = []

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        async with super().connection() as connection:
            yield cast(Connection, Explaining(connection, self.plans))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[ExplainingDatabase]:
    """One product with half of all engines, all made late, and all its events early; many with the rest."""
    await migrate(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO products (product_id, slug, max_engines, allowed_images)"
            " SELECT lpad(to_hex(i), 32, '0')::uuid, 'p' || i, 1000000, '{}' FROM generate_series(1, %s) AS i",
            [1 + SMALL_PRODUCTS],
        )
        connection.execute(
            "INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key)"
            " SELECT gen_random_uuid(),"
            " lpad(to_hex(CASE WHEN i > %s THEN 1 ELSE 2 + i %% %s END), 32, '0')::uuid,"
            " 'u' || i, CASE WHEN i %% 7 = 0 THEN 'failed' ELSE 'running' END, 'i', 'n', '', ''"
            " FROM generate_series(1, %s) AS i",
            [ENGINES // 2, SMALL_PRODUCTS, ENGINES],
        )
        connection.execute(
            "INSERT INTO audit_events (at, action, actor, outcome, product_id, engine_id, user_id, duration_ms)"
            " SELECT CASE WHEN n <= %s THEN clock_timestamp() - interval '1 min'"
            # Many in this month, however young it is: what has next to nothing is rightly read whole.
            " WHEN n %% 3 = 0 THEN least(month, late) + greatest(late - month, interval '0') * random()"
            " ELSE late - interval '100 days' * random() END,"
            " CASE WHEN n %% 1000 = 0 THEN 'health_failed' ELSE 'provision' END,"
            " 'system', 'succeeded', product_id, engine_id, user_id, 300"
            " FROM (SELECT *, row_number() OVER (ORDER BY engine_id) AS n FROM engines) AS engines,"
            " (SELECT clock_timestamp() - interval '2 hours' AS late,"
            " date_trunc('month', clock_timestamp(), 'UTC') AS month) AS times"
            " ORDER BY product_id",
            [EVENTS_1H],
        )
        connection.execute("SELECT make_audit_partitions()")
        connection.execute("VACUUM ANALYZE")
        # What was counted at once here comes over months elsewhere, and is folded and cleared away meanwhile.
        await fold(database_url)
        connection.execute("VACUUM FULL counts")
    database = ExplainingDatabase(database_url)
    await database.open()
    yield database
    await database.close()


async def fold(database_url: str) -> None:
    database = Database(database_url, application_name="test")
    await database.open()
    await FleetStore(database).fold_counts()
    await database.close()


def nodes(plan: Plan) -> Iterator[Plan]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def rows_read(plan: Plan) -> dict[str, int]:
    """How many rows each scan has read, be it in vain, by how and what it scanned."""
    read = {}
    for node in nodes(plan):
        if "Relation Name" in node:
            vain = (node.get(f"Rows Removed by {how}", 0) for how in ("Filter", "Index Recheck"))
            read[f"{node['Node Type']} of {node['Relation Name']}"] = node["Actual Rows"] + sum(vain)
    return read


@pytest.mark.parametrize("product_id", [None, BIG], ids=["operator", "product"])
async def test_no_answer_reads_all_that_there_is(database: ExplainingDatabase, product_id: UUID | None) -> None:
    fleet = Fleet(FleetStore(database), AuditStore(database), restart_max_attempts=8)

    def page(status: str, token: str) -> Call:
        return lambda: fleet.engines(product_id, status=status, limit=LIMIT, offset=0, token=token)

    def events(**wanted: str) -> Call:
        narrowed = {"action": "", "user_id": "", "product_id": "", "token": ""} | wanted
        return lambda: fleet.audit_events(product_id, limit=LIMIT, **narrowed)

    calls: dict[str, Call] = {
        "status": lambda: fleet.status(product_id),
        "metrics": lambda: fleet.metrics(product_id),
        "history": lambda: fleet.history(BIG, f"u{ENGINES}", LIMIT),
        "events": events(),
        "events, second page": events(token=(await events()()).next_page_token),
        "events of an action": events(action="health_failed"),
        "events of an action that never was": events(action="stop"),
    }
    whose = {} if product_id else {"product_id": str(BIG)}
    calls["events of a user"] = events(user_id=f"u{ENGINES}", **whose)
    calls["events of a user and an action"] = events(user_id=f"u{ENGINES}", action="stop", **whose)
    for status in ("", "failed"):
        far = await fleet.engines(product_id, status=status, limit=1, offset=ENGINES // 20, token="")
        assert far.next_page_token is not None
        calls[f"first page, status '{status}'"] = page(status, "")
        calls[f"far page, status '{status}'"] = page(status, far.next_page_token)

    # As many as there are products.
    most = {"counts": 3 * (1 + SMALL_PRODUCTS), "products": 1 + SMALL_PRODUCTS}
    for name, call in calls.items():
        database.plans.clear()
        await call()
        assert database.plans
        for plan in database.plans:
            read = rows_read(plan)
            assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= MOST_BLOCKS, (name, read)
            for scan, rows in read.items():
                table = scan.split()[-1]
                assert rows <= most.get(table, EVENTS_1H if name == "metrics" else LIMIT + 1), (name, read)
