"""Addresses that the platform is about to listen on."""

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from errno import EADDRINUSE

from services.cli.failure import Failure
from services.shared.tls import UNIX


def claim(wanted: Mapping[str, str]) -> dict[str, str]:
    """Checks that all addresses can be listened on; returns them with a free port for every 0.

    Args:
        wanted: `host:port` by the variable that sets it; `unix:` and a path is taken as it is.

    Raises:
        Failure: one can't; it names the address and the variable.
    """
    claimed = {}
    # Held until all are known, so that no two get the same port.
    with ExitStack() as held:
        for variable, address in wanted.items():
            if address.startswith(UNIX):
                claimed[variable] = address
                continue
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal() or int(port) > 65535:
                raise Failure(f"{variable}: {address!r} must be host:port")
            listener = held.enter_context(socket.socket())
            # What old connections left behind is no obstacle; a listener still is.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, int(port)))
                listener.listen()
            except PermissionError:
                raise Failure(f"port {port} is for root alone; {variable} chooses another one") from None
            except socket.gaierror:
                raise Failure(f"{variable}: {host!r} is not an address of this host") from None
            except OSError as error:
                why = "is taken" if error.errno == EADDRINUSE else f"can't be had on {host}: {error.strerror}"
                raise Failure(f"port {port} {why}; {variable} chooses another one") from None
            claimed[variable] = f"{host}:{listener.getsockname()[1]}"
    return claimed


def reachable(address: str) -> str:
    """Where a process of this host reaches what listens on `address`."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host == "0.0.0.0" else address  # noqa: S104 - compared, not bound
