"""Failpoints: none is forgotten, and none does anything unless a test turned it on."""

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from services.shared import failpoints
from tests.harness import ROOT

PASS = "from services.shared.failpoints import reached; reached('boot.created'); reached('boot.created'); print('on')"


def run(directory: Path | None) -> "subprocess.CompletedProcess[str]":
    """A process that comes to a failpoint twice."""
    environment = {} if directory is None else {failpoints.VARIABLE: str(directory)}
    return subprocess.run(
        [sys.executable, "-c", PASS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_each_failpoint_is_in_the_code() -> None:
    places = Counter(
        node.args[0].value
        for path in (ROOT / "services").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reached"
        if isinstance(node.args[0], ast.Constant)
    )
    assert set(places) == set(get_args(failpoints.Point))


def test_a_failpoint_does_nothing_in_a_process_that_was_not_told(tmp_path: Path) -> None:
    (tmp_path / "boot.created").symlink_to("SIGKILL")
    assert run(None).stdout == "on\n"
    assert os.listdir(tmp_path) == ["boot.created"]


@pytest.mark.parametrize("action", ["SIGKILL", "raise"])
def test_a_failpoint_breaks_one_process_once(tmp_path: Path, action: str) -> None:
    (tmp_path / "boot.created").symlink_to(action)
    broken = run(tmp_path)
    assert broken.stdout == ""
    assert broken.returncode == -signal.SIGKILL if action == "SIGKILL" else "FailpointRaised" in broken.stderr
    assert run(tmp_path).stdout == "on\n"


def test_a_failpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "boot.creatd").symlink_to("SIGKILL")
    refused = run(tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "ORCH_FAILPOINTS: there is no such failpoint: boot.creatd\n"
