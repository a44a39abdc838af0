"""The orderly end of a gateway: Envoy itself drops what is under way when it is told to end."""

import json
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

DRAIN_S = 10.0
"""How long calls under way have to be answered, in seconds."""
GRACE_S = 20.0
"""How long Envoy may take to end after that, in seconds."""

_PAUSE_S = 0.05
_QUIET_S = 0.5
_TIMEOUT_S = 2.0
_ACTIVE = ("http.gateway.downstream_rq_active", "http.operators.downstream_rq_active")
_TOTAL = ("http.gateway.downstream_rq_total", "http.operators.downstream_rq_total")
_WATCHES_LEFT = "cluster.provisioner.circuit_breakers.high.remaining_rq"
_WATCHES_MAX = 1000


def drain(admin_file: Path, grace_s: float, notice_s: float = 0) -> None:
    """Makes a gateway take no more calls, and returns when those under way are answered and no more come.

    First it closes each connection with its next answer, so that callers go elsewhere of themselves. One that has
    just connected may have sent a call that is not read yet.

    Watches are not waited for, since they have no end. A gateway that doesn't answer is left as it is.

    Args:
        admin_file: holds the address of Envoy's admin interface, once it has started.
        grace_s: the longest to wait for them, in seconds.
        notice_s: how long it takes new connections meanwhile, in seconds.
    """
    admin = admin_file.read_text()
    if not admin:
        return
    with suppress(OSError, HTTPException, ValueError, KeyError):
        _ask(admin, "POST", "/healthcheck/fail")
        time.sleep(notice_s)
        _ask(admin, "POST", "/drain_listeners")
        end = time.monotonic() + grace_s
        begun, quiet_since = -1, time.monotonic()
        while (now := time.monotonic()) < min(quiet_since + _QUIET_S, end):
            under_way, total = _calls(admin)
            if under_way or total != begun:
                begun, quiet_since = total, now
            time.sleep(_PAUSE_S)


def _calls(admin: str) -> tuple[int, int]:
    """How many calls are under way, and how many there ever were."""
    names = "|".join((*_ACTIVE, *_TOTAL, _WATCHES_LEFT))
    stats = json.loads(_ask(admin, "GET", f"/stats?format=json&filter=^({names})$"))["stats"]
    values = {stat["name"]: int(stat["value"]) for stat in stats}
    watches = _WATCHES_MAX - values[_WATCHES_LEFT]
    return sum(values[name] for name in _ACTIVE) - watches, sum(values[name] for name in _TOTAL)


def _ask(admin: str, method: str, path: str) -> bytes:
    connection = HTTPConnection(admin, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path)
        return connection.getresponse().read()
    finally:
        connection.close()
