"""What wrong keys may cost, by the address that they come from.

Every wrong key takes a token of its address. Once there is none, a call from there whose key is not known to be good
waits before the key is looked up, so that only so many are looked up each second, and what more there is, is refused at
once. The gateway takes a refusal up and makes the next ones itself. Who shows a key that is known to be good is not
held up, from that address either.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from services.shared.errors import RateLimited

_PER_S = 100.0
_AT_ONCE = 1000.0
_WAIT_S = 1.0
# As many as come in that time by a gateway that knows of the flood.
_MOST_WAITING = 200
_MOST_ADDRESSES = 10_000
_NETWORK_BITS = 64


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class Guesses:
    """The wrong keys of late. The addresses heard of longest ago are forgotten first.

    Args:
        clock: monotonic, in seconds.
        sleep: waits as many seconds.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._buckets: OrderedDict[str | int, _Bucket] = OrderedDict()
        self._waiting = 0

    async def turn(self, address: str) -> None:
        """Returns once a key from this address may be looked up.

        Args:
            address: of IP; one of version 6 stands for its network of 64 bits.

        Raises:
            RateLimited: too many were wrong, and too many wait.
        """
        bucket = self._buckets.get(_origin(address))
        if bucket is None or self._tokens(bucket) >= 1:
            return
        if self._waiting == _MOST_WAITING:
            raise _too_many()
        self._waiting += 1
        try:
            await self._sleep(_WAIT_S)
        finally:
            self._waiting -= 1

    def wrong(self, address: str) -> None:
        """Takes note that a key from this address was wrong.

        Raises:
            RateLimited: so were too many before.
        """
        origin = _origin(address)
        bucket = self._buckets.setdefault(origin, _Bucket(_AT_ONCE, self._clock()))
        self._buckets.move_to_end(origin)
        if len(self._buckets) > _MOST_ADDRESSES:
            self._buckets.popitem(last=False)
        left = self._tokens(bucket)
        if left < 1:
            raise _too_many()
        bucket.left, bucket.at = left - 1, self._clock()

    def _tokens(self, bucket: _Bucket) -> float:
        return min(bucket.left + (self._clock() - bucket.at) * _PER_S, _AT_ONCE)


def _too_many() -> RateLimited:
    # guesses.lua of the gateway knows this text.
    return RateLimited("too many wrong keys from this address", retry_after_s=_WAIT_S)


def _origin(address: str) -> str | int:
    try:
        ip = ip_address(address)
    except ValueError:
        # A unix socket's; or nonsense, of which there would be no end.
        return ""
    if not isinstance(ip, IPv6Address):
        return address
    return int(ip) >> (128 - _NETWORK_BITS) if ip.ipv4_mapped is None else str(ip.ipv4_mapped)
