"""May this user go in, and where is their engine? The decision, without any transport."""

from collections.abc import Callable, Sequence
from typing import Protocol

from services.admission.activity import Activity
from services.admission.domain import Admitted, Decision, DenialReason, Denied, Engine, EngineStatus, Product
from services.admission.metrics import ADMITS, ADMITTED
from services.admission.ratelimit import Limiter
from services.admission.registry import Registry
from services.shared.errors import (
    EngineNotFound,
    InvalidPlatformKey,
    InvalidRequest,
    QuotaExceeded,
    RateLimited,
    ServiceError,
)
from services.shared.guesses import Guesses
from services.shared.keys import platform_key_hash
from services.shared.user_id import check_user_id

# Errors that keep a user out though nothing is wrong.
_DENIALS = frozenset({RateLimited.code, QuotaExceeded.code})


class Provisioner(Protocol):
    """Asked only when no running engine is known."""

    async def ensure(
        self, platform_key: str, user_id: str, *, auto_provision: bool, auto_wake: bool, timeout_s: float | None
    ) -> Engine | DenialReason:
        """The user's running engine, joined while it boots, made or woken if allowed; or why there is none.

        Args:
            timeout_s: how long the caller waits, in seconds; None for as long as a boot may take.

        Raises:
            ServiceError: what the Provisioner answered; `Unavailable` if it can't be reached.
        """


class Admission:
    """Args:
    registry: what is known of products and engines.
    limiter: grants a product's admits.
    provisioner: makes and wakes engines.
    activity: takes note of what was decided.
    """

    def __init__(self, registry: Registry, limiter: Limiter, provisioner: Provisioner, activity: Activity) -> None:
        self._guesses = Guesses()
        self._registry = registry
        self._limiter = limiter
        self._provisioner = provisioner
        self._activity = activity

    async def admit(
        self,
        platform_keys: Sequence[str],
        user_id: str,
        address: Callable[[], str],
        *,
        auto_provision: bool,
        auto_wake: bool,
        keep_awake_s: int = 0,
        timeout_s: float | None = None,
    ) -> Decision:
        """Decides whether a user goes in. Idempotent, and safe on every request of the user.

        Only calls that are authentic and well-formed count for the product's rate, and those
        count whatever comes of them.

        Args:
            platform_keys: every value of the caller's key header.
            user_id: the product's own id of the user.
            address: gives the address of IP that the call comes from.
            auto_provision: make the engine if there is none.
            auto_wake: wake the engine if it sleeps.
            keep_awake_s: seconds in which the engine is not put to sleep; cut to what the policy allows.
            timeout_s: how long the caller waits, in seconds; None if it did not say.

        Raises:
            InvalidPlatformKey, InvalidRequest, RateLimited, Unavailable, and what a boot can fail with.
        """
        product = await self._authenticate(platform_keys, address)
        check_user_id(user_id)
        if keep_awake_s < 0:
            raise InvalidRequest("keep_awake_s: must not be negative")
        keep_awake_s = min(keep_awake_s, product.max_keep_awake_s)
        try:
            await self._limiter.take(product)
            engine = await self._registry.engine(product.product_id, user_id)
            if engine is not None and engine.status is EngineStatus.RUNNING:
                # Nothing has run since the look: whoever announces a sleep finds either the note, or
                # that this replica knew of the announcement.
                self._activity.admitted(engine.engine_id, keep_awake_s)
                ADMITS.counts[ADMITTED] += 1
                return Admitted(engine)
            reason = _denial(engine, auto_provision=auto_provision, auto_wake=auto_wake)
            if reason is None:
                answer = await self._provisioner.ensure(
                    platform_keys[0], user_id, auto_provision=auto_provision, auto_wake=auto_wake, timeout_s=timeout_s
                )
                self._registry.forget_engine(product.product_id, user_id)
                if isinstance(answer, Engine):
                    self._activity.admitted(answer.engine_id, keep_awake_s)
                    ADMITS.counts[ADMITTED] += 1
                    return Admitted(answer)
                reason = answer
        except ServiceError as error:
            if error.code in _DENIALS:
                self._activity.denied(product.product_id, error.code)
            raise
        self._activity.denied(product.product_id, reason)
        ADMITS.counts[reason] += 1
        return Denied(reason)

    async def engine(self, platform_keys: Sequence[str], user_id: str, address: Callable[[], str]) -> Engine:
        """A user's engine as it is; see `admit` for the arguments.

        Raises:
            InvalidPlatformKey, RateLimited, InvalidRequest, EngineNotFound, Unavailable.
        """
        product = await self._authenticate(platform_keys, address)
        check_user_id(user_id)
        engine = await self._registry.engine_now(product.product_id, user_id)
        if engine is None:
            raise EngineNotFound
        return engine

    async def _authenticate(self, platform_keys: Sequence[str], address: Callable[[], str]) -> Product:
        try:
            key_hash = platform_key_hash(platform_keys)
            if not self._registry.knows_key(key_hash):
                await self._guesses.turn(address())
            product = await self._registry.product_by_key(key_hash)
            if product is None:
                raise InvalidPlatformKey
        except InvalidPlatformKey:
            self._guesses.wrong(address())
            raise
        return product


def _denial(engine: Engine | None, *, auto_provision: bool, auto_wake: bool) -> DenialReason | None:
    """Why a user without a running engine may not go in; None if the Provisioner is to be asked."""
    if engine is None or engine.status is EngineStatus.DESTROYING:
        return None if auto_provision else DenialReason.ENGINE_NOT_FOUND
    if engine.booting or engine.status is EngineStatus.PROVISIONING:
        return None
    if engine.status is EngineStatus.SLEEPING and auto_wake:
        return None
    if engine.status in (EngineStatus.SLEEPING, EngineStatus.STOPPED):
        return DenialReason.ENGINE_SLEEPING
    return DenialReason.ENGINE_UNHEALTHY
