"""Child processes: they end with their parent, or when it says so."""

import asyncio
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO


async def start(
    *command: str, environment: Mapping[str, str], stdout: int | IO[bytes], stderr: int | IO[bytes] | None = None
) -> asyncio.subprocess.Process:
    """Runs a command that ends with this process, in a session of its own: Ctrl-C reaches only the parent.

    To be called from the main thread; `services.shared.child` says why.
    """
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.shared.child", str(os.getpid()), *command),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


async def stop(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """SIGTERM, and SIGKILL after `grace_s` seconds; returns when it has ended."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(grace_s):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
