"""The PostgreSQL from a package, over a directory of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest

from services.shared import embedded_postgres
from tests.harness import ROOT


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "postgres"
    yield directory
    embedded_postgres.stop(directory)


def answers(url: str) -> bool:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT true").fetchone() == (True,)


def test_starts_again_after_a_stop_in_the_same_process(data_dir: Path) -> None:
    assert answers(embedded_postgres.start(data_dir))
    assert embedded_postgres.is_running(data_dir)
    embedded_postgres.stop(data_dir)
    assert not embedded_postgres.is_running(data_dir)
    assert answers(embedded_postgres.start(data_dir))


def test_is_not_taken_for_running_when_another_process_has_the_pid_of_a_dead_one(data_dir: Path) -> None:
    embedded_postgres.start(data_dir)
    pid_file = data_dir / "postmaster.pid"
    _, _, rest = pid_file.read_text().partition("\n")
    embedded_postgres.stop(data_dir)
    pid_file.write_text(f"{os.getpid()}\n{rest}")

    assert not embedded_postgres.is_running(data_dir)
    assert answers(embedded_postgres.start(data_dir))


def test_what_is_removed_after_a_stop_stays_so_when_the_process_ends(tmp_path: Path) -> None:
    # Where another user may enter.
    with TemporaryDirectory(prefix="september-") as directory:
        script = (
            "import shutil, sys; from pathlib import Path; from services.shared.embedded_postgres import start, stop;"
            "data_dir = Path(sys.argv[1]) / 'data'; start(data_dir); stop(data_dir); shutil.rmtree(data_dir.parent)"
        )
        removed = Path(directory) / "all"
        subprocess.run([sys.executable, "-c", script, removed], cwd=ROOT, check=True)
        assert not removed.exists()


def test_refuses_a_path_too_long_for_its_socket(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="too long"):
        embedded_postgres.start(tmp_path / ("x" * 100) / "postgres")
