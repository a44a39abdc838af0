"""The warm pool in the registry: rows of engines without an owner.

A member's row, key, volume and port are those that its user will have. Locks are taken in the order
pool, idempotency key, product, engine, operation.
"""

import time
from collections.abc import Callable
from uuid import UUID

from services.provisioner.domain.engine import Engine
from services.provisioner.domain.intent import Newborn
from services.provisioner.domain.operation import SYSTEM
from services.provisioner.domain.warm_pool import Member
from services.provisioner.store.idempotency import begun_before, note
from services.provisioner.store.intents import IntentStore
from services.provisioner.store.rows import load_sql, to_engine
from services.shared.postgres import Connections

_SQL = load_sql("warm_pool")

# A member that does not come up is no reason to try again at once.
_PAUSE_S = 10.0


class WarmPoolStore:
    """The pool of one node.

    Args:
        database: the registry.
        intents: writes the rows of engines and their operations.
        node: whose engines.
    """

    def __init__(self, database: Connections, intents: IntentStore, *, node: str) -> None:
        self._database = database
        self._intents = intents
        self._node = node

    async def members(self) -> list[Member]:
        """All but those that are being destroyed; the ready ones first, the older before the younger."""
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["members"], {"node": self._node})
            return [Member(**row) for row in await cursor.fetchall()]

    async def candidates(self, image: str, product_id: UUID, user_id: str) -> list[Member]:
        """Ready members of the image, in any order; none if the user has an engine."""
        values = {"node": self._node, "image": image, "product_id": product_id, "user_id": user_id}
        async with self._database.connection() as connection:
            cursor = await connection.execute(_SQL["candidates"], values)
            return [Member(**row) for row in await cursor.fetchall()]

    async def claim(
        self, member: Member, product_id: UUID, user_id: str, actor: str, *, begun: float, fresh_until: float
    ) -> Engine | None:
        """Makes the member the user's engine; None if it is somebody else's by now, or is being destroyed,
        or if the call is one that has begun to give the user an engine before.

        The quota is checked in the same transaction, under the product's lock, as for an engine that
        is yet to be made.

        Args:
            begun: when the user asked, on this process's monotonic clock, for the history.
            fresh_until: when, on that clock, what was seen of the member says nothing any more: it is
                left alone if the product's lock had to be waited for until then.

        Raises:
            InvalidRequest, PolicyDenied, EngineAlreadyExists, QuotaExceeded.
        """
        values = {"engine_id": member.engine_id, "product_id": product_id, "user_id": user_id, "actor": actor}
        async with self._intents.turn(product_id), self._database.transaction() as tx:
            if await begun_before(tx) is not None:
                return None
            await self._intents.check_room(tx, product_id, user_id, member.image)
            now = time.monotonic()
            if now > fresh_until:
                return None
            cursor = await tx.execute(_SQL["claim"], {**values, "duration_ms": round((now - begun) * 1000)})
            row = await cursor.fetchone()
            if row is None:
                return None
            await note(tx, row["operation_id"])
            return to_engine(row)

    async def refill(self, make: Callable[[], Newborn], *, size: int, most_booting: int) -> bool:
        """Writes one more member to be booted; False if there are enough, or none is to be booted now.

        Counted under the pool's lock, so that no two Provisioners fill the same place.

        Args:
            make: makes it, if there is room.
            size: how many members there may be.
            most_booting: how many of them may be booting.

        Raises:
            PortExhaustion: no port of the node is free.
        """
        async with self._database.transaction() as tx:
            await tx.execute(_SQL["lock_pool"], {"node": self._node})
            cursor = await tx.execute(_SQL["fill"], {"node": self._node, "pause_s": _PAUSE_S})
            fill = await cursor.fetchone()
            assert fill is not None, "an aggregate has a row"
            if fill["failing"] or fill["members"] >= size or fill["booting"] >= most_booting:
                return False
            await self._intents.add(tx, make(), SYSTEM)
            return True

    async def drop(self, member: Member) -> None:
        """Begins to destroy the member; nothing if it has an owner by now."""
        async with self._database.transaction() as tx:
            cursor = await tx.execute(_SQL["lock_member"], {"engine_id": member.engine_id})
            row = await cursor.fetchone()
            if row is not None:
                await self._intents.begin_destroy(tx, to_engine(row), SYSTEM)
