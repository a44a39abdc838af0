"""One process of the platform, as `up` runs it."""

import asyncio
import signal
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from services.cli.failure import failure_with_log
from services.shared import children


class Part:
    """A child in a session of its own, so that Ctrl-C reaches only its parent. Made by `start`."""

    def __init__(self, name: str, log: Path, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._log = log
        self._process = process

    @classmethod
    async def start(cls, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> "Part":
        """Runs `command`, its output into `log`; it ends with this process. Call it from the main thread."""
        with log.open("ab") as output:
            process = await children.start(*command, environment=environment, stdout=output, stderr=output)
        return cls(name, log, process)

    async def watch(self) -> NoReturn:
        """Raises `Failure` when it ends."""
        code = await self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise failure_with_log(f"{self.name} {how}", self._log)

    async def healthy(self, answer: Awaitable[None], timeout_s: float) -> None:
        """Waits for `answer`, its first sign of health.

        Raises:
            Failure: there is none within `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await answer
        except TimeoutError:
            raise failure_with_log(f"{self.name} is not healthy after {timeout_s:g} s", self._log) from None

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after `grace_s` seconds; returns when it has ended."""
        await children.stop(self._process, grace_s)
