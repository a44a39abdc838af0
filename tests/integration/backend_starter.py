"""A process that boots an engine and is then there to be killed.

`python -m tests.integration.backend_starter INSTALLATION DATA_DIR ENGINE_ID PORT`: prints `ready`,
waits for a line on its input, boots the engine, prints `started`, and waits for ever.
"""

import asyncio
import signal
import sys
from pathlib import Path
from uuid import UUID

from services.provisioner.backends.base import EngineSpec
from services.provisioner.backends.process import ProcessBackend


async def main(installation: str, data_dir: str, engine_id: str, port: str) -> None:
    backend = ProcessBackend(installation, Path(data_dir))
    await backend.open()
    spec = EngineSpec(UUID(engine_id), 1, "tests.engines.never_healthy", int(port), {})
    print("ready", flush=True)
    sys.stdin.readline()
    await backend.create(spec)
    await backend.start(spec)
    print("started", flush=True)
    signal.pause()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
