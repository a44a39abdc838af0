"""The registry as Admission remembers it, kept true by the change feed.

What is remembered is what the registry held at the moment `known_at` of its clock, or later: the
feed is read every second, and what it names is forgotten, to be looked up again when it is
asked for. Notifications name it sooner, and nothing depends on them.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from uuid import UUID

import structlog

from services.admission.domain import Engine, EngineStatus, Product
from services.admission.memory import Found, Freshness, Memory
from services.admission.registry import EngineKey, RegistrySource
from services.shared.errors import Unavailable
from services.shared.loops import Pulse

log = structlog.get_logger(__name__)

_INTERVAL_S = 1.0
# Between two readings, however many notifications come.
_PAUSE_S = 0.05
_READ_S = 2.0
_MAX_KEYS = 10_000
_MAX_ENGINES = 100_000


class ReadModel:
    """Args:
    source: the registry.
    stale_ok_s: how long running engines are admitted to without the registry, in seconds.
    clock: monotonic, in seconds.
    """

    known_at: datetime

    def __init__(
        self, source: RegistrySource, *, stale_ok_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._source = source
        self._clock = clock
        self._freshness = Freshness(stale_ok_s, clock)
        self._keys: Memory[bytes, Product] = Memory(
            self._freshness, self._look_up_keys, lasting=lambda _: True, size=_MAX_KEYS
        )
        self._engines: Memory[EngineKey, Engine] = Memory(
            self._freshness,
            self._look_up_engines,
            lasting=lambda engine: engine.status is EngineStatus.RUNNING,
            size=_MAX_ENGINES,
        )
        self._next: str | None = None
        self._incarnation: UUID | None = None
        self._seen: frozenset[int] = frozenset()
        self._pulse = Pulse()

    async def product_by_key(self, key_hash: bytes) -> Product | None:
        return await self._keys.get(key_hash)

    def knows_key(self, key_hash: bytes) -> bool:
        return key_hash in self._keys

    async def engine(self, product_id: UUID, user_id: str) -> Engine | None:
        return await self._engines.get((product_id, user_id))

    async def engine_now(self, product_id: UUID, user_id: str) -> Engine | None:
        key = (product_id, user_id)
        found = (await self._source.engines([key])).get(key)
        if isinstance(found, Exception):
            raise found
        return found

    def forget_engine(self, product_id: UUID, user_id: str) -> None:
        self._engines.forget((product_id, user_id))

    def age_s(self) -> float:
        """How old what is known may be, in seconds, if notifications are lost."""
        return self._freshness.age_s()

    def stale(self) -> bool:
        """Whether the registry is done without."""
        return not self._freshness.vouches()

    def remembered(self) -> tuple[int, int]:
        """How many platform keys and engines are known, those included that do not exist."""
        return len(self._keys), len(self._engines)

    def hear(self, notification: str) -> None:
        """A notification of the change feed, `product` or `product user`; empty after a reconnect."""
        product_id, _, user_id = notification.partition(" ")
        if product_id:
            self._forget(UUID(product_id), user_id or None)
        self._pulse.give()

    async def run(self) -> None:
        while True:
            await self._pulse.wait(_INTERVAL_S - _PAUSE_S)
            try:
                await self.tick()
            except Unavailable:
                log.warning("change_feed_unreachable")
            await asyncio.sleep(_PAUSE_S)

    async def tick(self) -> None:
        """Reads the feed and forgets what it names; after a gap renews all that is remembered.

        Raises:
            Unavailable: the registry can't be reached; from now on it is done without.
        """
        began = self._clock()
        gap = self._freshness.gap()
        try:
            async with asyncio.timeout(_READ_S):
                changes = await self._source.changes(None if gap else self._next)
                if changes.incarnation != self._incarnation and not gap:
                    # Restored from a backup: what was read before says nothing of it.
                    gap, changes = True, await self._source.changes(None)
            if gap:
                # However long that takes of many: every batch has its own time limit.
                await self._keys.renew()
                await self._engines.renew()
        except TimeoutError as error:
            self._freshness.lose()
            raise Unavailable("the registry did not answer in time") from error
        except Unavailable:
            self._freshness.lose()
            raise
        for change_id in changes.changed.keys() - self._seen:
            self._forget(*changes.changed[change_id])
        self._freshness.read(began)
        self._next, self._seen = changes.next, frozenset(changes.changed)
        self._incarnation = changes.incarnation
        self.known_at = changes.at

    def _forget(self, product_id: UUID, user_id: str | None) -> None:
        if user_id is not None:
            self._engines.forget((product_id, user_id))
        else:
            self._keys.forget_all(lambda product: product.product_id == product_id)

    async def _look_up_keys(self, key_hashes: Sequence[bytes]) -> Mapping[bytes, Found[Product]]:
        now = self._clock()
        return {
            key_hash: Found(key.product)
            if key.seconds_left is None
            else Found(key.product, until=now + key.seconds_left)
            for key_hash, key in (await self._source.platform_keys(key_hashes)).items()
        }

    async def _look_up_engines(self, keys: Sequence[EngineKey]) -> Mapping[EngineKey, Found[Engine] | Exception]:
        return {
            key: engine if isinstance(engine, Exception) else Found(engine)
            for key, engine in (await self._source.engines(keys)).items()
        }
