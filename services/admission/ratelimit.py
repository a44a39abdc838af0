"""The limit on a product's admits: no more than `rate_limit_rpm` in any 60 seconds.

PostgreSQL grants the tokens, in one statement under the product's lock and on its own clock, so
that the limit holds over all replicas and restarts.
"""

from typing import Protocol

from services.admission.domain import Product
from services.admission.registry_sql import SQL
from services.shared.errors import RateLimited
from services.shared.postgres import Database

_WINDOW_S = 60


class Limiter(Protocol):
    async def take(self, product: Product) -> None:
        """Takes one token of the product's.

        Raises:
            RateLimited: none is left; says after how many seconds one is.
            Unavailable: nobody can grant one now.
        """


class SqlLimiter:
    """Takes every token from PostgreSQL."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def take(self, product: Product) -> None:
        if product.rate_limit_rpm is None:
            return
        values = {
            "product_id": product.product_id,
            "rate_limit_rpm": product.rate_limit_rpm,
            "window_s": _WINDOW_S,
        }
        async with self._database.connection() as connection:
            cursor = await connection.execute(SQL["take_token"], values)
            row = await cursor.fetchone()
        if row is not None and row["wait_s"] is not None:
            raise RateLimited(
                f"the product is over its {product.rate_limit_rpm} admits a minute", retry_after_s=row["wait_s"]
            )
