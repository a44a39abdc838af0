"""Engines over HTTP: their health, and their new keys."""

import json

import aiohttp

from services.provisioner.ports import EngineHealth

# An engine's answer is a few hundred bytes; more is not an answer.
_MAX_BYTES = 64 * 1024
_NOT_WELL = EngineHealth(healthy=False, active=False)


class HttpEngineClient:
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

    async def health(self, url: str) -> EngineHealth:
        """What `GET /health` says: healthy is 200 with `"status": "ok"`, in time."""
        try:
            async with self._session.get(f"{url}/health", allow_redirects=False) as response:
                if response.status != 200:
                    return _NOT_WELL
                body = json.loads(await response.content.read(_MAX_BYTES))
        except (aiohttp.ClientError, OSError, ValueError, RecursionError):
            # Whatever it says: brackets in brackets, for one.
            return _NOT_WELL
        if not isinstance(body, dict):
            return _NOT_WELL
        return EngineHealth(healthy=body.get("status") == "ok", active=body.get("active") is True)

    async def rotate_key(self, url: str, key: str, new_key_hash: str, overlap_s: float) -> int:
        """See `services.provisioner.ports.EngineClient`."""
        body = {"key_hash": new_key_hash, "overlap_s": overlap_s}
        headers = {"X-Engine-Key": key}
        try:
            async with self._session.post(
                f"{url}/internal/rotate-key", json=body, headers=headers, allow_redirects=False
            ) as response:
                return response.status
        except (aiohttp.ClientError, OSError):
            return 0
