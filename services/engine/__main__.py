"""Starts the engine: settings from the environment, one server, an orderly end on SIGTERM or SIGINT."""

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from services.engine.conversation import Conversations, DatabaseUnavailable
from services.engine.handler import Engine, Handler
from services.engine.keys import KeyRing, parse_key_hash
from services.engine.log import log
from services.engine.server import Server
from services.engine.turns import Turns

# Seconds for running turns after SIGTERM; the contract gives 30 for all of it.
DRAIN_S = 25


class Settings(NamedTuple):
    key_hash: str
    database: str
    catalog: Path
    host: str
    port: int


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ`.

    Raises:
        ValueError: names the variable that is wrong, not its value.
    """
    try:
        key_hash = parse_key_hash(environ.get("ENGINE_KEY_HASH", ""))
    except ValueError:
        raise ValueError("ENGINE_KEY_HASH must be the SHA-256 of the API key as 64 hexadecimal digits") from None
    port = environ.get("PORT", "8000")
    if not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ValueError("PORT must be a number from 0 (any free port) to 65535")
    return Settings(
        key_hash,
        environ.get("SQLITE_DB_PATH", "/data/brain.sqlite"),
        Path(environ.get("CATALOG_DIR", "/catalog")),
        environ.get("HOST", "0.0.0.0"),  # noqa: S104 - in a container the published port is the border
        int(port),
    )


def run(settings: Settings) -> None:
    """Serves until a signal ends it.

    Raises:
        DatabaseUnavailable: the database can't be opened.
        OSError: the address can't be listened on.
    """
    conversations = Conversations(settings.database)
    conversations.open()
    engine = Engine(KeyRing(settings.key_hash), conversations, Turns(), settings.catalog, time.monotonic())
    listener = socket.create_server((settings.host, settings.port), backlog=128)
    server = Server(listener, lambda connection, server: Handler(connection, server, engine))

    def stop(_signal: int, _frame: FrameType | None) -> None:
        server.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log("started", host=settings.host, port=listener.getsockname()[1])
    server.run()
    cut = server.drain(DRAIN_S)
    conversations.close()
    log("stopped", requests_cut=cut)


def main() -> int:
    try:
        settings = read_settings(os.environ)
    except ValueError as error:
        log("refused", reason=str(error))
        return 2
    try:
        run(settings)
    except DatabaseUnavailable as error:
        log("failed", reason=f"SQLITE_DB_PATH: {error}")
        return 1
    except OSError as error:
        log("failed", reason=f"HOST, PORT: {error.strerror}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
