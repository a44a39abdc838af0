"""The use cases of those who look at many engines, and at what happened."""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol, TypeVar
from uuid import UUID

from services.provisioner.domain.audit import AuditAction, AuditEvent, AuditFilter, AuditPage
from services.provisioner.domain.engine import EngineStatus
from services.provisioner.domain.fleet import (
    EngineHistory,
    EnginePage,
    EngineReport,
    EngineSummary,
    FleetMetrics,
    FleetStatus,
    PastHour,
    WarmPoolFill,
    summarize,
)
from services.provisioner.domain.paging import page_key, page_limit, page_token
from services.shared.errors import EngineNotFound, InvalidRequest
from services.shared.user_id import check_user_id

_E = TypeVar("_E", bound=StrEnum)


class Engines(Protocol):
    async def engines(
        self,
        product_id: UUID | None,
        status: EngineStatus | None,
        *,
        after: tuple[datetime, UUID] | None,
        offset: int,
        limit: int,
    ) -> list[EngineSummary]: ...
    async def counts(self, product_id: UUID | None) -> dict[str, int]: ...
    async def warm_pool(self) -> WarmPoolFill: ...
    async def past_hour(self, product_id: UUID | None) -> PastHour: ...
    async def report(self, product_id: UUID, user_id: str) -> EngineReport | None: ...


class Audit(Protocol):
    async def events(self, wanted: AuditFilter, *, before: int | None, limit: int) -> list[AuditEvent]: ...


class Fleet:
    """What a product, or with None in its place an operator, may see.

    Args:
        engines: reads and counts engines.
        audit: reads the audit log.
        restart_max_attempts: automatic restarts after which an engine is given up.
    """

    def __init__(self, engines: Engines, audit: Audit, *, restart_max_attempts: int) -> None:
        self._engines = engines
        self._audit = audit
        self._restart_max_attempts = restart_max_attempts

    async def engines(
        self, product_id: UUID | None, *, status: str, limit: int | None, offset: int, token: str
    ) -> EnginePage:
        """Engines, the oldest first.

        Args:
            status: only those in it; empty for all.
            limit: most to return; None for the default.
            offset: how many to leave out first.
            token: of the page, from the one before; empty for the first.

        Raises:
            InvalidRequest: naming the parameter.
        """
        wanted = _one_of(EngineStatus, "status", status)
        limit = page_limit(limit)
        if offset < 0:
            raise InvalidRequest("offset: must not be negative")
        after = page_key(token, _engine_key)
        if offset and after is not None:
            raise InvalidRequest("offset: not together with a page_token")
        # One more than asked for tells whether there is a next page.
        found = await self._engines.engines(product_id, wanted, after=after, offset=offset, limit=limit + 1)
        engines = found[:limit]
        by_status = _by_status(await self._engines.counts(product_id))
        return EnginePage(
            engines=engines,
            total=sum(by_status.values()) if wanted is None else by_status[wanted],
            next_page_token=_engine_token(engines[-1]) if len(found) > limit else None,
        )

    async def status(self, product_id: UUID | None) -> FleetStatus:
        by_status = _by_status(await self._engines.counts(product_id))
        return FleetStatus(by_status, await self._engines.warm_pool() if product_id is None else None)

    async def metrics(self, product_id: UUID | None) -> FleetMetrics:
        counts = await self._engines.counts(product_id)
        return FleetMetrics(
            past_hour=await self._engines.past_hour(product_id),
            total_provisions=counts.get("provision", 0),
            total_destroys=counts.get("destroy", 0),
            total_claims=counts.get("claim", 0),
        )

    async def history(self, product_id: UUID, user_id: str, limit: int | None) -> EngineHistory:
        """How the user's engine is, why, and what happened to it and to those before it.

        Raises:
            InvalidRequest, EngineNotFound.
        """
        check_user_id(user_id)
        limit = page_limit(limit)
        report = await self._engines.report(product_id, user_id)
        if report is None:
            raise EngineNotFound
        return EngineHistory(
            report=report,
            summary=summarize(report, restart_max_attempts=self._restart_max_attempts),
            events=await self._audit.events(AuditFilter(product_id, user_id), before=None, limit=limit),
        )

    async def audit_events(
        self,
        caller: UUID | None,
        *,
        action: str,
        user_id: str,
        product_id: str,
        limit: int | None,
        token: str,
    ) -> AuditPage:
        """Audit events, the latest first.

        Args:
            caller: the product that asks, which sees its own; None for operators.
            action: only this one; empty for all.
            user_id: only of this user's engines; empty for all. Of operators only with a product.
            product_id: only of this product; empty for all. For operators only.
            limit: most to return; None for the default.
            token: of the page, from the one before; empty for the first.

        Raises:
            InvalidRequest: naming the parameter.
        """
        wanted = AuditFilter(
            product_id=_product_filter(caller, product_id),
            user_id=user_id or None,
            action=_one_of(AuditAction, "action", action),
        )
        if wanted.user_id is not None:
            check_user_id(wanted.user_id)
            if wanted.product_id is None:
                raise InvalidRequest("user_id: only together with a product_id")
        limit = page_limit(limit)
        found = await self._audit.events(wanted, before=page_key(token, _event_key), limit=limit + 1)
        events = found[:limit]
        return AuditPage(events, page_token(str(events[-1].event_id)) if len(found) > limit else None)


def _one_of(kind: type[_E], name: str, value: str) -> _E | None:
    if not value:
        return None
    try:
        return kind(value)
    except ValueError as error:
        raise InvalidRequest(f"{name}: must be one of {', '.join(kind)}") from error


def _product_filter(caller: UUID | None, product_id: str) -> UUID | None:
    if not product_id:
        return caller
    if caller is not None:
        raise InvalidRequest("product_id: for operators only; a product sees its own events")
    try:
        return UUID(product_id)
    except ValueError as error:
        raise InvalidRequest("product_id: must be a UUID") from error


def _by_status(counts: dict[str, int]) -> dict[EngineStatus, int]:
    return {status: counts.get(f"engines:{status}", 0) for status in EngineStatus}


def _engine_token(engine: EngineSummary) -> str:
    return page_token(f"{engine.created_at.isoformat()} {engine.engine_id}")


def _engine_key(text: str) -> tuple[datetime, UUID]:
    created_at, _, engine_id = text.partition(" ")
    parsed = datetime.fromisoformat(created_at)
    # Of the offsets that Python reads PostgreSQL takes only some, and a token has none.
    if parsed.utcoffset() != timedelta():
        raise ValueError
    return parsed, UUID(engine_id)


def _event_key(text: str) -> int:
    event_id = int(text)
    if not 0 < event_id < 2**63:
        raise ValueError
    return event_id
