"""The one check after every run: the registry, and what exists, say the same."""

from contextlib import suppress

import psutil

from tests.harness import Platform, eventually

_ALIVE = "SELECT count(*) FROM engines WHERE status = 'running' OR status = 'sleeping' AND NOT deep_asleep"


def oracle(platform: Platform) -> None:
    """Waits for open operations, and asserts that rows = ports leased = volumes, and processes = ports listened on.

    Engines that were stopped, or sleep deeply, have no process; a container they have.

    Args:
        platform: all its Provisioners at rest or gone.
    """
    eventually(lambda: platform.open_operations() == 0, "every operation has ended")
    counts = platform.counts()
    assert counts["rows"] == counts["ports"] == counts["volumes"], counts
    if "containers" in counts:
        assert counts["containers"] == counts["rows"], counts
        return

    def each_has_one() -> bool:
        return platform.query(_ALIVE) == [(len(platform.engine_processes()),)]

    # One that was too slow for a probe is being restarted.
    eventually(each_has_one, "every engine that is awake has a process, and no other", 10)
    processes = platform.engine_processes()
    listened = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            listened |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    leased = {port for (port,) in platform.query("SELECT port FROM port_leases")}
    assert listened <= leased, (listened, leased)
    assert len(listened) == len(processes), (listened, processes)
