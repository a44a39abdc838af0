"""Products in the registry."""

from dataclasses import asdict
from uuid import UUID

from services.provisioner.domain.audit import AuditAction
from services.provisioner.domain.policy import Policy
from services.provisioner.domain.product import Product, Registration
from services.provisioner.store.idempotency import transaction
from services.provisioner.store.rows import load_sql, to_product, to_registration
from services.shared.postgres import Connection, Database

_SQL = load_sql("products")


class ProductStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def insert(self, product: Product, key_hash: bytes, actor: str) -> bool:
        """Writes a product with its key, limiter and audit event; False if the slug is taken."""
        async with transaction(self._database) as tx:
            values = {"product_id": product.product_id, "slug": product.slug, **_policy_values(product.policy)}
            cursor = await tx.execute(_SQL["insert_product"], values)
            if cursor.rowcount == 0:
                return False
            await tx.execute(_SQL["insert_rate_limiter"], values)
            await tx.execute(_SQL["insert_platform_key"], {**values, "key_hash": key_hash})
            await _audit(tx, product.product_id, AuditAction.POLICY_REGISTER, actor)
        return True

    async def update_policy(self, product_id: UUID, policy: Policy, actor: str) -> bool:
        """Replaces a product's policy, with an audit event; False if there is no such product."""
        async with transaction(self._database) as tx:
            values = {"product_id": product_id, **_policy_values(policy)}
            cursor = await tx.execute(_SQL["update_policy"], values)
            if cursor.rowcount == 0:
                return False
            await _audit(tx, product_id, AuditAction.POLICY_UPDATE, actor)
        return True

    async def replace_key(self, product_id: UUID, key_hash: bytes, grace_s: int, actor: str) -> bool:
        """Adds a key and lets the others end in `grace_s` seconds, with an audit event.

        Under the product's lock: of two new keys at once, the second ends the first.
        False if there is no such product.
        """
        async with transaction(self._database) as tx:
            values = {"product_id": product_id, "key_hash": key_hash, "grace_s": grace_s}
            cursor = await tx.execute(_SQL["lock_product"], values)
            if await cursor.fetchone() is None:
                return False
            await tx.execute(_SQL["expire_platform_keys"], values)
            await tx.execute(_SQL["insert_platform_key"], values)
            detail = f"the old keys are taken for {grace_s} s more"
            await _audit(tx, product_id, AuditAction.KEY_ROTATE, actor, detail)
        return True

    async def set_disabled(self, product_id: UUID, disabled: bool, actor: str) -> Registration | None:
        """Disables or enables a product, with an audit event if that changes it.

        Returns the product as it is then; None if there is no such product.
        """
        statement = "disable_product" if disabled else "enable_product"
        action = AuditAction.PRODUCT_DISABLE if disabled else AuditAction.PRODUCT_ENABLE
        async with transaction(self._database) as tx:
            cursor = await tx.execute(_SQL[statement], {"product_id": product_id})
            if cursor.rowcount:
                await _audit(tx, product_id, action, actor)
            return await _product(tx, product_id)

    async def get(self, product_id: UUID) -> Registration | None:
        async with self._database.connection() as connection:
            return await _product(connection, product_id)

    async def page(self, after: str, limit: int) -> list[Registration]:
        """Up to `limit` products by slug, from the first that comes after this one."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["products"], {"after": after, "limit": limit})
            return [to_registration(row) for row in await cursor.fetchall()]

    async def by_key_hash(self, key_hash: bytes) -> Product | None:
        """The product whose key is taken now and has this SHA-256."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["product_by_key"], {"key_hash": key_hash})
            row = await cursor.fetchone()
            return None if row is None else to_product(row)


async def _product(connection: Connection, product_id: UUID) -> Registration | None:
    cursor = await connection.execute(_SQL["product"], {"product_id": product_id})
    row = await cursor.fetchone()
    return None if row is None else to_registration(row)


async def _audit(tx: Connection, product_id: UUID, action: AuditAction, actor: str, detail: str | None = None) -> None:
    values = {"product_id": product_id, "action": action, "actor": actor, "detail": detail}
    await tx.execute(_SQL["insert_audit_event"], values)


def _policy_values(policy: Policy) -> dict[str, object]:
    return {**asdict(policy), "allowed_images": list(policy.allowed_images)}
