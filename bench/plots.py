"""The plots, as SVG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# The same numbers give the same file.
mpl.rcParams["svg.hashsalt"] = "bench"
_MARKERS = "osD^vP*X"


def throughput(file: Path, curves: Mapping[str, Mapping[int, float]]) -> None:
    """Requests a second by calls under way at once, for each contender."""
    figure, axes = _axes("calls under way at once", "requests/s")
    for marker, (name, rates) in zip(_MARKERS, curves.items(), strict=False):
        axes.plot(list(rates), list(rates.values()), marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    _save(figure, axes, file)


def latency(file: Path, percentiles: Mapping[str, Mapping[str, float]]) -> None:
    """Milliseconds by percentile at half of saturation, for each contender."""
    figure, axes = _axes("percentile", "ms")
    for marker, (name, values) in zip(_MARKERS, percentiles.items(), strict=False):
        axes.plot(list(values), list(values.values()), marker=marker, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    _save(figure, axes, file)


def registry(file: Path, rates: Mapping[int, Sequence[float]]) -> None:
    """Requests a second by engines in the registry: each round, and the median's line."""
    figure, axes = _axes("engines in the registry, 10,000 of them active", "requests/s")
    medians = {size: sorted(rounds)[len(rounds) // 2] for size, rounds in rates.items()}
    axes.plot(list(medians), list(medians.values()), marker="o", label="median")
    for size, rounds in rates.items():
        axes.plot([size] * len(rounds), rounds, "k.", alpha=0.4)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    _save(figure, axes, file)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, file: Path) -> None:
    axes.legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None})
