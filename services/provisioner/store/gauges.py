"""What the registry knows of how things stand, as numbers."""

from services.provisioner.store.rows import load_sql
from services.shared.postgres import Database

_SQL = load_sql("gauges")


class GaugeStore:
    """Args:
    database: the registry.
    node: whose warm pool and ports are counted.
    ports: which of them may be leased.
    """

    def __init__(self, database: Database, *, node: str, ports: range) -> None:
        self._database = database
        self._values = {"node": node, "port_min": ports.start, "port_max": ports.stop - 1}

    async def read(self) -> dict[tuple[str, str | None], float]:
        """Numbers by gauge and label; see the statement. One that is 0 may be missing."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["gauges"], self._values)
            return {(row["gauge"], row["label"]): row["n"] for row in await cursor.fetchall()}
