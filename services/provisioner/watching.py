"""Watching one engine change."""

from collections.abc import AsyncIterator
from typing import Protocol
from uuid import UUID

from services.provisioner.domain.engine import Engine, Sighting
from services.provisioner.domain.product import Product
from services.shared.errors import EngineNotFound, Unavailable
from services.shared.loops import Broadcast
from services.shared.user_id import check_user_id

# Changes are announced; this is for those whose announcement was lost.
_POLL_S = 1.0


class Sightings(Protocol):
    async def engine_of_user(self, product_id: UUID, user_id: str) -> Engine | None: ...
    async def sighting(self, engine_id: UUID) -> Sighting | None: ...


class Watching:
    """Args:
    sightings: looks at engines.
    changes: says that something may have changed.
    """

    def __init__(self, sightings: Sightings, changes: Broadcast) -> None:
        self._sightings = sightings
        self._changes = changes
        self._stopping = False

    def stop(self) -> None:
        """Ends all watches: who watches comes back to another Provisioner, or to the next."""
        self._stopping = True
        self._changes.give()

    async def watch(self, product: Product, user_id: str) -> AsyncIterator[Sighting]:
        """How the user's engine is, and again whenever that changes, until the engine is gone.

        What lasts only moments may go unseen.

        Raises:
            InvalidRequest, EngineNotFound, Unavailable.
        """
        check_user_id(user_id)
        engine = await self._sightings.engine_of_user(product.product_id, user_id)
        if engine is None:
            raise EngineNotFound
        last: Sighting | None = None
        with self._changes.listener() as changed:
            while (now := await self._sightings.sighting(engine.engine_id)) is not None:
                if now != last:
                    yield now
                    last = now
                await changed.wait(_POLL_S)
                if self._stopping:
                    raise Unavailable("the provisioner is stopping, watch again")
