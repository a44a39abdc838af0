"""The registry in PostgreSQL."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from services.admission.domain import Engine, EngineStatus, Product
from services.admission.registry import Changes, EngineKey, PlatformKey
from services.shared import queries
from services.shared.errors import Unavailable
from services.shared.keys import EngineKeyring, UnreadableKey
from services.shared.postgres import Database

SQL = queries.load(files("services.admission") / "sql" / "registry.sql")


class SqlRegistry:
    def __init__(self, database: Database, keyring: EngineKeyring) -> None:
        self._database = database
        self._keyring = keyring

    async def platform_keys(self, key_hashes: Sequence[bytes]) -> Mapping[bytes, PlatformKey]:
        async with self._database.connection() as connection:
            cursor = await connection.execute(SQL["platform_keys"], {"key_hashes": list(key_hashes)})
            rows = await cursor.fetchall()
        return {
            row["key_hash"]: PlatformKey(
                Product(row["product_id"], row["rate_limit_rpm"], row["max_keep_awake_s"]), row["seconds_left"]
            )
            for row in rows
        }

    async def engines(self, keys: Sequence[EngineKey]) -> Mapping[EngineKey, Engine | Exception]:
        values = {
            "product_ids": [product_id for product_id, _ in keys],
            "user_ids": [user_id for _, user_id in keys],
        }
        async with self._database.connection() as connection:
            cursor = await connection.execute(SQL["engines"], values)
            rows = await cursor.fetchall()
        return {(row["product_id"], row["user_id"]): self._to_engine(row) for row in rows}

    async def changes(self, since: str | None) -> Changes:
        async with self._database.connection() as connection:
            cursor = await connection.execute(SQL["changes"], {"since": since})
            rows = await cursor.fetchall()
        changed = {
            row["change_id"]: (row["product_id"], row["user_id"]) for row in rows if row["change_id"] is not None
        }
        return Changes(rows[0]["at"], rows[0]["next"], rows[0]["incarnation"], changed)

    def _to_engine(self, row: dict[str, Any]) -> Engine | Exception:
        try:
            api_key = self._keyring.decrypt(row["engine_id"], row["encrypted_key"])
            status = EngineStatus(row["status"])
        except UnreadableKey as error:
            return error
        except ValueError:
            return Unavailable("the engine's status is known to a later version alone")
        return Engine(
            engine_id=row["engine_id"],
            user_id=row["user_id"],
            status=status,
            url=row["url"],
            api_key=api_key,
            engine_version=row["image"],
            created_at=row["created_at"],
            last_health_at=row["last_health_at"],
            booting=row["booting"],
        )
