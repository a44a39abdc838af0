"""Asks engines for their health over HTTP."""

import json

import aiohttp

# An engine's answer is a few hundred bytes; more is not an answer.
_MAX_BYTES = 64 * 1024


class HttpProber:
    """Args:
    timeout_s: how long an engine may take to answer, in seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession

    async def open(self) -> None:
        # A new connection each time: an idle one says nothing of an engine that was frozen since.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            connector=aiohttp.TCPConnector(limit=64, force_close=True),
        )

    async def close(self) -> None:
        await self._session.close()

    async def healthy(self, url: str) -> bool:
        """Whether the engine answers `GET /health` with 200 and `"status": "ok"`, in time."""
        try:
            async with self._session.get(f"{url}/health", allow_redirects=False) as response:
                if response.status != 200:
                    return False
                body = json.loads(await response.content.read(_MAX_BYTES))
                return isinstance(body, dict) and body.get("status") == "ok"
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return False
