"""A child of `september up`: known when it ends, and never longer there than its parent."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from services.cli.failure import Failure
from services.cli.part import Part
from tests.harness import eventually

# Starts a child that writes its pid, and stays.
PARENT = """
import asyncio, sys
from pathlib import Path
from services.cli.part import Part

CHILD = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"

async def main():
    await Part.start("child", [sys.executable, "-c", CHILD], {}, Path(sys.argv[1]))
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def part(tmp_path: Path, code: str) -> Part:
    return await Part.start("child", [sys.executable, "-c", code], os.environ, tmp_path / "child.log")


async def test_a_part_that_ends_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = await part(tmp_path, "for i in range(30): print(f'line {i}')\nraise SystemExit(3)")
    with pytest.raises(Failure) as failure:
        await child.watch()
    first, *lines = str(failure.value).splitlines()
    assert first == f"child ended with exit code 3; the end of {tmp_path / 'child.log'}:"
    assert lines == [f"  line {i}" for i in range(10, 30)]


async def test_a_part_that_is_killed_is_named_with_the_signal(tmp_path: Path) -> None:
    child = await part(tmp_path, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(Failure, match=r"was killed by SIGKILL; .*\n.*empty"):
        await child.watch()


async def test_a_part_that_is_deaf_to_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    child = await part(
        tmp_path, "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    eventually(lambda: "deaf" in (tmp_path / "child.log").read_text(), "the child runs")
    await child.stop(0.1)
    with pytest.raises(Failure, match="SIGKILL"):
        await child.watch()


async def test_stopping_a_part_that_has_ended_is_no_error(tmp_path: Path) -> None:
    child = await part(tmp_path, "")
    with pytest.raises(Failure, match="exit code 0"):
        await child.watch()
    await child.stop(0.1)


def test_a_part_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    log.touch()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, log])
    child = psutil.Process(int(eventually(log.read_text, "the child runs")))
    parent.kill()
    parent.wait()

    def ended() -> bool:
        with suppress(psutil.NoSuchProcess):
            return child.status() == psutil.STATUS_ZOMBIE
        return True

    eventually(ended, "the child ends")


def test_nothing_is_run_for_a_parent_that_has_already_ended(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    marker = tmp_path / "run"
    child = subprocess.run([sys.executable, "-m", "services.shared.child", str(gone.pid), "touch", marker], check=False)
    assert child.returncode == 1
    assert not marker.exists()
