"""The one check after every run: the registry, and what exists, say the same."""

from collections.abc import Iterable
from contextlib import suppress

import psutil

from tests.harness import Platform, eventually

_HAS_A_PROCESS = "SELECT engine_id FROM engines WHERE status = 'running' OR status = 'sleeping' AND NOT deep_asleep"
_MAY_HAVE_ONE = "SELECT engine_id FROM engines WHERE status <> 'stopped' AND (status <> 'sleeping' OR NOT deep_asleep)"


def oracle(platform: Platform) -> None:
    """Waits for open operations, and asserts that rows = ports leased = volumes, and processes = ports listened on.

    Engines that were stopped, or sleep deeply, have no process; a container they have.

    Args:
        platform: all its Provisioners at rest or gone.
    """
    counts = platform.counts_at_rest()
    assert counts["rows"] == counts["ports"] == counts["volumes"], counts
    if "containers" in counts:
        assert counts["containers"] == counts["rows"], counts
        return

    def each_has_one() -> bool:
        found = _engines(platform)
        assert len(set(found.values())) == len(found), f"two processes of one engine: {found}"
        strays = set(found.values()) - _ids(platform, _MAY_HAVE_ONE)
        # One that was about to be destroyed is gone by now: the row goes last.
        assert not strays & set(_engines(platform).values()), f"processes of no engine that is awake: {strays}"
        if set(found.values()) != _ids(platform, _HAS_A_PROCESS):
            return False
        listened = _listened(found)
        leased = {port for (port,) in platform.query("SELECT port FROM port_leases")}
        assert listened <= leased, (listened, leased)
        return len(listened) == len(found)

    # One that was too slow for a probe, or has failed, is being restarted. Nothing else is waited for: what is too
    # many, the reconciler would remove meanwhile.
    eventually(each_has_one, "every engine that is awake has a process that listens", 10)


def _listened(pids: Iterable[int]) -> set[int]:
    """The ports that the processes listen on."""
    ports = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            connections = psutil.Process(pid).net_connections("tcp")
            ports |= {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}
    return ports


def _engines(platform: Platform) -> dict[int, str]:
    """The engine of each process, of those that live at the same time: none ends while the others are looked for."""
    found = {}
    for process in platform.engine_processes():
        with suppress(psutil.Error, KeyError):
            found[process.pid] = process.environ()["SEPTEMBER_ENGINE_ID"]
    return found


def _ids(platform: Platform, query: str) -> set[str]:
    return {str(engine_id) for (engine_id,) in platform.query(query)}
