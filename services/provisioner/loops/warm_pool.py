"""Keeps engines booted ahead, and hands them out.

Invariant: a member is handed out once, and only just after it was found running and well. The look
comes first and the claim, on the condition that it is a member still, after it: until then nobody
sees it as anybody's engine, and one that was found dead never was one. What is claimed never comes
back.

Filling and draining are led by one Provisioner of the node, because two may differ in what they are
told; that it does not overfill rests on the registry's lock, and not on who leads.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from uuid import UUID

import structlog

from services.provisioner.backends.base import Backend
from services.provisioner.domain.engine import Engine, EngineStatus
from services.provisioner.domain.health import prober_is_ill
from services.provisioner.domain.intent import Newborn
from services.provisioner.domain.warm_pool import Member
from services.provisioner.metrics import POOL_CLAIMS
from services.provisioner.ports import EngineClient
from services.shared.errors import ServiceError
from services.shared.failpoints import reached
from services.shared.loops import Pulse

log = structlog.get_logger(__name__)

_POLL_S = 1.0
# How often members are looked at, and how long one may take to answer: no user waits for it yet, so
# one that is slow is not worth keeping.
_LOOK_EVERY_S = 5.0
_ANSWER_S = 1.0
# How old a look may be when the claim has got the product's lock.
_FRESH_S = 0.25
# A caller who has waited for so long is better served by a boot.
_SEARCH_S = 2.0
_FAILED = EngineStatus.FAILED


class Members(Protocol):
    """The pool in the registry; see the store for the transactions."""

    async def members(self) -> list[Member]: ...
    async def candidates(self, image: str, product_id: UUID, user_id: str) -> list[Member]: ...
    async def claim(
        self, member: Member, product_id: UUID, user_id: str, actor: str, *, begun: float, fresh_until: float
    ) -> Engine | None: ...
    async def refill(self, make: Callable[[], Newborn], *, size: int, most_booting: int) -> bool: ...
    async def drop(self, member: Member) -> None: ...


class WarmPool:
    """Args:
    members: the pool in the registry, for claims.
    led: the same, for the loop that one process runs at a time.
    backend: knows what runs.
    engines: asks engines how they are.
    make: makes a member that is to be booted.
    image: what members run; those of another are drained.
    size: how many members there are to be.
    most_booting: how many of them may be booting at once.
    """

    def __init__(
        self,
        members: Members,
        led: Members,
        backend: Backend,
        engines: EngineClient,
        make: Callable[[], Newborn],
        *,
        image: str,
        size: int,
        most_booting: int,
    ) -> None:
        self._members = members
        self._led = led
        self._backend = backend
        self._engines = engines
        self._make = make
        self._image = image
        self._size = size
        self._most_booting = most_booting
        self._held: set[UUID] = set()
        self._look_at = 0.0
        self._pulse = Pulse()

    async def claim(self, image: str, product_id: UUID, user_id: str, actor: str) -> Engine | None:
        """A member that is the user's engine from now on; None if there is none to hand out, or the user has one.

        Raises:
            InvalidRequest, PolicyDenied, EngineAlreadyExists, QuotaExceeded, Unavailable.
        """
        if not self._size or image != self._image:
            return None
        engine = await self._search(image, product_id, user_id, actor)
        POOL_CLAIMS.labels("miss" if engine is None else "hit").inc()
        return engine

    async def _search(self, image: str, product_id: UUID, user_id: str, actor: str) -> Engine | None:
        begun = time.monotonic()
        for member in await self._members.candidates(image, product_id, user_id):
            if member.engine_id in self._held:
                continue  # Another caller is at it.
            with self._holding(member):
                looked = time.monotonic()
                try:
                    async with asyncio.timeout(_SEARCH_S - (time.monotonic() - begun)):
                        current, well = await self._look(member)
                except TimeoutError:
                    return None  # The backend says nothing: a boot waits until it does.
                except ServiceError:
                    continue
                if not current:
                    await _drop(self._members, member, "it had ended, or its image is another now")
                if not (current and well):
                    # One that is only silent may be well on a machine that is not: the next look at all tells.
                    continue
                reached("pool.looked")
                engine = await self._members.claim(
                    member, product_id, user_id, actor, begun=begun, fresh_until=looked + _FRESH_S
                )
                reached("pool.claimed")
                if engine is not None:
                    return engine
        return None

    @contextmanager
    def _holding(self, member: Member) -> Iterator[None]:
        self._held.add(member.engine_id)
        try:
            yield
        finally:
            self._held.discard(member.engine_id)
            self._pulse.give()

    async def run(self) -> None:
        postponed = None
        while True:
            before, postponed = postponed, None
            try:
                await self.tick()
            except ServiceError as error:
                postponed = error.message
                if postponed != before:
                    log.warning("warm_pool_postponed", reason=postponed)
            await self._pulse.wait(_POLL_S)

    async def tick(self) -> None:
        """Drains what is not to stay, and begins as many boots as there is room for.

        Raises:
            PortExhaustion: there is no port for one more member.
            Unavailable: registry or backend can't be reached.
        """
        members = await self._led.members()
        if not members and not self._size:
            return
        good = [one for one in members if one.image == self._image and one.status != _FAILED and not one.stuck]
        kept = good[: self._size]
        complete = len(members) == len(kept) == self._size
        look = time.monotonic() >= self._look_at
        if complete and not look:
            return
        for member in members:
            if member not in kept:
                await _drop(self._led, member, "it is not to stay")
        if look:
            self._look_at = time.monotonic() + _LOOK_EVERY_S
            await self._examine([one for one in kept if one.status == EngineStatus.RUNNING])
        while await self._led.refill(self._make, size=self._size, most_booting=self._most_booting):
            reached("pool.refilled")

    async def _examine(self, ready: list[Member]) -> None:
        looks = await asyncio.gather(*(self._looked(member) for member in ready))
        ended = [member for member, look in zip(ready, looks, strict=True) if look is not None and not look[0]]
        silent = [member for member, look in zip(ready, looks, strict=True) if look == (True, False)]
        for member in ended:
            await _drop(self._led, member, "it had ended, or its image is another now")
        if prober_is_ill(len(silent), len(ready)):
            return
        for member in silent:
            await _drop(self._led, member, "it did not answer well")

    async def _looked(self, member: Member) -> tuple[bool, bool] | None:
        """A look; None if the backend can't tell of this one now."""
        try:
            return await self._look(member)
        except ServiceError as error:
            log.warning("warm_engine_not_seen", engine_id=str(member.engine_id), reason=error.message)
            return None

    async def _look(self, member: Member) -> tuple[bool, bool]:
        """Whether it runs what its image's name stands for now, and whether it answers well.

        The backend's word as well: something else might answer on its port.
        """
        return await asyncio.gather(
            self._backend.is_current(member.engine_id, member.image), self._answers_well(member)
        )

    async def _answers_well(self, member: Member) -> bool:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return (await self._engines.health(member.url)).healthy
        except TimeoutError:
            return False


async def _drop(members: Members, member: Member, reason: str) -> None:
    log.info("warm_engine_dropped", engine_id=str(member.engine_id), reason=reason)
    await members.drop(member)
    reached("pool.dropped")
