"""Products in the registry."""

from uuid import UUID

from services.provisioner.domain.policy import Policy
from services.provisioner.domain.product import Product
from services.provisioner.store.rows import load_sql, to_product
from services.shared.postgres import Database

_SQL = load_sql("products")


class ProductStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, product: Product, key_hash: bytes, actor: str) -> bool:
        """Writes a product with its key, limiter and audit event; False if the slug is taken."""
        async with self._database.transaction() as tx:
            values = {"product_id": product.product_id, "slug": product.slug, **_policy_values(product.policy)}
            cursor = await tx.execute(_SQL["insert_product"], values)
            if cursor.rowcount == 0:
                return False
            await tx.execute(_SQL["insert_rate_limiter"], values)
            await tx.execute(_SQL["insert_platform_key"], {**values, "key_hash": key_hash})
            await tx.execute(_SQL["insert_audit_event"], {**values, "action": "policy_register", "actor": actor})
        return True

    async def update_policy(self, product_id: UUID, policy: Policy, actor: str) -> bool:
        """Replaces a product's policy, with an audit event; False if there is no such product."""
        async with self._database.transaction() as tx:
            values = {"product_id": product_id, **_policy_values(policy)}
            cursor = await tx.execute(_SQL["update_policy"], values)
            if cursor.rowcount == 0:
                return False
            await tx.execute(_SQL["insert_audit_event"], {**values, "action": "policy_update", "actor": actor})
        return True

    async def by_key_hash(self, key_hash: bytes) -> Product | None:
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["product_by_key"], {"key_hash": key_hash})
            row = await cursor.fetchone()
            return None if row is None else to_product(row)


def _policy_values(policy: Policy) -> dict[str, object]:
    return {
        "max_engines": policy.max_engines,
        "rate_limit_rpm": policy.rate_limit_rpm,
        "allowed_images": list(policy.allowed_images),
    }
