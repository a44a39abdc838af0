"""What `september` keeps in its directory, and who may read it."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli.var_directory import InUse, VarDirectory

NASTY = 'it\'s "$HOME" `id` \\ a&b;c #d\nx'


@pytest.fixture
def var(tmp_path: Path) -> VarDirectory:
    return VarDirectory(tmp_path / "var")


@pytest.fixture
def open_umask() -> Iterator[None]:
    """A umask that takes nothing away."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("open_umask")
def test_a_secret_is_for_its_owner_alone_whatever_the_umask(var: VarDirectory) -> None:
    var.secret("master_key", lambda: "s3cret")
    path = var.path / "secrets" / "master_key"
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700


def test_a_secret_is_made_once(var: VarDirectory) -> None:
    assert var.secret("admin_key", lambda: "first") == "first"
    assert var.secret("admin_key", lambda: "second") == "first"
    assert VarDirectory(var.path).secret("admin_key", lambda: "third") == "first"


def test_a_forgotten_secret_is_made_anew(var: VarDirectory) -> None:
    var.secret("demo", lambda: "first")
    var.forget("demo")
    assert var.secret("demo", lambda: "second") == "second"


def test_a_secret_that_can_not_be_made_leaves_nothing(var: VarDirectory) -> None:
    def refused() -> str:
        raise ValueError

    with pytest.raises(ValueError):
        var.secret("demo", refused)
    assert var.secret("demo", lambda: "made") == "made"
    assert [path.name for path in (var.path / "secrets").iterdir()] == ["demo"]


@pytest.mark.usefixtures("open_umask")
def test_the_environment_is_announced_to_its_owner_alone_and_only_meanwhile(var: VarDirectory) -> None:
    with var.announced({"ADMIN_KEY": "s3cret"}):
        assert mode(var.environment) == 0o600
        assert mode(var.environment.parent) == 0o700
    assert not var.environment.exists()


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("source", ['. "$0"; export A B', 'set -a; . "$0"'])
def test_a_shell_reads_every_value_as_it_was(var: VarDirectory, shell: str, source: str) -> None:
    with var.announced({"A": NASTY, "B": "postgresql://u:p%20w@/db?host=/a b&x=1"}):
        script = f"{source}; printenv A B"
        read = subprocess.run([shell, "-c", script, var.environment], check=True, capture_output=True, text=True)
    assert read.stdout == f"{NASTY}\npostgresql://u:p%20w@/db?host=/a b&x=1\n"
    assert read.stderr == ""


def test_only_one_gets_inside_and_the_other_learns_who_is(var: VarDirectory) -> None:
    with var.exclusive(), pytest.raises(InUse, match=rf"pid {os.getpid()}$"), VarDirectory(var.path).exclusive():
        pytest.fail("two inside")
    with var.exclusive():
        pass


def test_the_log_of_the_last_run_is_kept(var: VarDirectory) -> None:
    var.log("admission").write_text("old")
    log = var.log("admission")
    assert not log.exists()
    assert log.with_name("admission.log.1").read_text() == "old"
    assert mode(log.parent) == 0o700
