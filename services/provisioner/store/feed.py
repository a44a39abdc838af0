"""The change feed, which triggers write and readers of the registry follow."""

from services.provisioner.store.rows import load_sql
from services.shared.postgres import Connections

_SQL = load_sql("feed")


class FeedStore:
    def __init__(self, database: Connections) -> None:
        self._database = database

    async def drop_read_changes(self) -> None:
        """Deletes what every reader has read by now, or does without."""
        async with self._database.connection() as connection:
            await connection.execute(_SQL["drop_read_changes"])
