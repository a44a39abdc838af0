"""How long the fleet's calls take with a million engines: `python -m bench.fleet [engines]`.

Rows are made in a PostgreSQL of the benchmark's own; the calls go over gRPC to a real Provisioner,
as an operator and as a product that has half of all engines.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table

from september.provisioner.v1 import fleet_service_pb2 as pb
from services.shared import embedded_postgres
from tests.harness import Clients, Platform, Product, new_database, running_platform

_CALLS = 20
_BUDGET_MS = 50
_SMALL_PRODUCTS = 1000
_EVENTS_1H = 20_000

Metadata = tuple[tuple[str, str], ...]


def fill(platform: Platform, product: Product, engines: int) -> None:
    """Gives the product half of so many engines and a thousand others the rest, and everybody a past."""
    with psycopg.connect(platform.database_url, autocommit=True) as connection:
        # Rows that would have come over months come at once; what triggers would have counted meanwhile,
        # and a loop folded, is counted at the end.
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO products (product_id, slug, max_engines, allowed_images)"
            " SELECT gen_random_uuid(), 'bench-' || i, 1000000, '{}' FROM generate_series(1, %s) AS i",
            [_SMALL_PRODUCTS],
        )
        connection.execute(
            "WITH others AS (SELECT array_agg(product_id) AS ids FROM products WHERE slug LIKE 'bench-%%')"
            " INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key, created_at)"
            " SELECT gen_random_uuid(), CASE WHEN i %% 2 = 0 THEN %s ELSE ids[i / 2 %% %s + 1] END, 'user-' || i,"
            " (ARRAY['running', 'running', 'running', 'sleeping', 'sleeping', 'stopped', 'failed'])[i %% 7 + 1],"
            " 'engine:1', 'bench', 'http://127.0.0.1:9001', 'x', clock_timestamp() - make_interval(secs => %s - i)"
            " FROM others, generate_series(1, %s) AS i",
            [product.product_id, _SMALL_PRODUCTS, engines, engines],
        )
        connection.execute(
            "INSERT INTO audit_events (at, action, actor, outcome, product_id, engine_id, user_id, duration_ms)"
            " SELECT CASE WHEN n <= %s THEN clock_timestamp() - interval '1 hour' * random()"
            " ELSE clock_timestamp() - interval '1 hour' - interval '300 days' * random() END,"
            " 'provision', 'bench', 'succeeded', product_id, engine_id, user_id, 300"
            " FROM (SELECT *, row_number() OVER () AS n FROM engines) AS engines",
            [_EVENTS_1H],
        )
        connection.execute(
            "INSERT INTO counts SELECT product_id, 'engines:' || status, count(*) FROM engines GROUP BY 1, 2"
        )
        connection.execute("INSERT INTO counts SELECT product_id, action, count(*) FROM audit_events GROUP BY 1, 2")
        connection.execute("SELECT make_audit_partitions()")
        connection.execute("ANALYZE")


async def median_ms(call: Callable[[], Awaitable[Any]]) -> float:
    times = []
    for _ in range(_CALLS):
        start = time.perf_counter()
        await call()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


async def measure(clients: Clients, product: Product, engines: int) -> list[tuple[str, float, float]]:
    async def both(call: Callable[[Metadata], Awaitable[Callable[[], Awaitable[Any]]]]) -> tuple[float, float]:
        return await median_ms(await call(clients.admin)), await median_ms(await call(product.metadata))

    def page(limit: int, *, deep: bool = False, **filters: Any) -> Any:
        async def prepared(metadata: Metadata) -> Callable[[], Awaitable[Any]]:
            request = pb.ListEnginesRequest(limit=limit, **filters)
            if deep:
                before = pb.ListEnginesRequest(limit=1, offset=engines // 20, **filters)
                request.page_token = (await clients.fleet.ListEngines(before, metadata=metadata)).next_page_token
            return lambda: clients.fleet.ListEngines(request, metadata=metadata)

        return prepared

    def plain(stub: Any, request: Any) -> Any:
        async def prepared(metadata: Metadata) -> Callable[[], Awaitable[Any]]:
            return lambda: stub(request, metadata=metadata)

        return prepared

    calls = {
        "ListEngines, first 100": page(100),
        "ListEngines, 100 deep in the list": page(100, deep=True),
        "ListEngines, first 100 failed": page(100, status="failed"),
        "ListEngines, 100 failed, deep": page(100, deep=True, status="failed"),
        "ListEngines, first 1000": page(1000),
        "GetFleetStatus": plain(clients.fleet.GetFleetStatus, pb.GetFleetStatusRequest()),
        "GetFleetMetrics": plain(clients.fleet.GetFleetMetrics, pb.GetFleetMetricsRequest()),
        "ListAuditEvents, first 100": plain(clients.fleet.ListAuditEvents, pb.ListAuditEventsRequest()),
    }
    return [(name, *await both(call)) for name, call in calls.items()]


async def run(platform: Platform, engines: int) -> list[tuple[str, float, float]]:
    clients = Clients(platform, platform.provisioner().address)
    try:
        product = await clients.register(max_engines=1_000_000)
        await asyncio.to_thread(fill, platform, product, engines)
        return await measure(clients, product, engines)
    finally:
        await clients.close()


def main() -> None:
    engines = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as directory:
        data_dir = Path(directory) / "postgres"
        url = embedded_postgres.start(data_dir)
        try:
            with running_platform(new_database(url), Path(directory)) as platform:
                rows = asyncio.run(run(platform, engines))
        finally:
            embedded_postgres.stop(data_dir)
    table = Table(title=f"{engines:,} engines, median of {_CALLS} calls in ms; budget {_BUDGET_MS}")
    for column in ("call", "operator", "product with half of them"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for name, operator, product in rows:
        table.add_row(name, f"{operator:.1f}", f"{product:.1f}")
    Console().print(table)
    if any(max(times) > _BUDGET_MS for _, *times in rows):
        sys.exit("over the budget")


if __name__ == "__main__":
    main()
