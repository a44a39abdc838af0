"""The registry, read from PostgreSQL at every call."""

from importlib.resources import files
from uuid import UUID

from services.admission.domain import Engine, EngineStatus, Product
from services.shared import queries
from services.shared.keys import EngineKeyring
from services.shared.postgres import Database

SQL = queries.load(files("services.admission") / "sql" / "registry.sql")


class SqlRegistry:
    def __init__(self, database: Database, keyring: EngineKeyring) -> None:
        self._database = database
        self._keyring = keyring

    async def product_by_key(self, key_hash: bytes) -> Product | None:
        async with self._database.connection() as connection:
            cursor = await connection.execute(SQL["product_by_key"], {"key_hash": key_hash})
            row = await cursor.fetchone()
        return None if row is None else Product(row["product_id"], row["rate_limit_rpm"], row["max_keep_awake_s"])

    async def engine(self, product_id: UUID, user_id: str) -> Engine | None:
        async with self._database.connection() as connection:
            cursor = await connection.execute(SQL["engine"], {"product_id": product_id, "user_id": user_id})
            row = await cursor.fetchone()
        if row is None:
            return None
        return Engine(
            engine_id=row["engine_id"],
            user_id=row["user_id"],
            status=EngineStatus(row["status"]),
            url=row["url"],
            api_key=self._keyring.decrypt(row["engine_id"], row["encrypted_key"]),
            engine_version=row["image"],
            created_at=row["created_at"],
            last_health_at=row["last_health_at"],
            booting=row["booting"],
        )
