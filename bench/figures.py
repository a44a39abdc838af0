"""What is promised and what was measured: targets, values and verdicts, a line of the table each."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.contenders import ADMIT, DIRECT, FAST_GRPC, FAST_REST, NO_OP, ONE_PROCESS
from bench.notifications import CHANGES_S
from bench.round_trips import RATE_S, RoundTrips

# Requests a second of each round, by what answered.
Rates = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table.

    Args:
        what: is measured.
        target: what the value has to reach, or not to exceed.
        at_least: which of the two.
        unit: of value and target, with the reference: "× no-op", " ms".
        value: measured; None if it was not.
        detail: ours and the reference, or why it was not measured.
    """

    what: str
    target: float
    at_least: bool
    unit: str
    value: float | None
    detail: str

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        over = (self.target - self.value if self.at_least else self.value - self.target) / self.target
        return "met" if over <= 0 else f"missed by {max(over, 0.01):.0%}"

    def cells(self) -> tuple[str, str, str, str]:
        bound = f"{'≥' if self.at_least else '≤'} {self.target:g}{self.unit}"
        measured = (
            self.detail if self.value is None else f"{self.value:.3g}{self.unit.partition(' × ')[0]} ({self.detail})"
        )
        return self.what, bound, measured, self.verdict


def ratio_figure(what: str, target: float, unit: str, rates: Rates, ours: str, reference: str) -> Figure:
    """A figure from the median of the ratios of each round."""
    if ours not in rates:
        return Figure(what, target, True, unit, None, "")
    ratio = statistics.median(a / b for a, b in zip(rates[ours], rates[reference], strict=True))
    detail = f"{statistics.median(rates[ours]):,.0f}/s to {statistics.median(rates[reference]):,.0f}/s"
    return Figure(what, target, True, unit, ratio, detail)


def throughput_figures(rates: Rates) -> list[Figure]:
    return [
        ratio_figure("Admit of a running engine, grpc.aio host", 0.85, " × a no-op call", rates, ADMIT, NO_OP),
        ratio_figure("Admit over REST, fast lane", 0.6, " × Envoy direct_response", rates, FAST_REST, DIRECT),
        ratio_figure("Admit over REST, fast lane", 6, " × the one-process design", rates, FAST_REST, ONE_PROCESS),
        ratio_figure("Admit over gRPC, fast lane", 4, " × the grpc.aio no-op", rates, FAST_GRPC, NO_OP),
    ]


def registry_figure(rates: Mapping[int, Sequence[float]]) -> Figure:
    medians = {size: statistics.median(found) for size, found in rates.items()}
    least, most = min(medians, key=lambda size: medians[size]), max(medians, key=lambda size: medians[size])
    what = f"{min(medians):,} to {max(medians):,} engines in the registry, 10,000 active: slowest to fastest"
    detail = f"{medians[least]:,.0f}/s with {least:,} to {medians[most]:,.0f}/s with {most:,}"
    return Figure(what, 0.9, True, " ×", medians[least] / medians[most], detail)


def latency_figures(percentiles: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    figures = []
    for name in (ADMIT, FAST_GRPC, FAST_REST):
        what, unit = f"p99 at half of saturation: {name}", " × the no-op's p50"
        if name not in percentiles:
            figures.append(Figure(what, 5, False, unit, None, ""))
            continue
        p99, p50 = percentiles[name]["99"], percentiles[NO_OP]["50"]
        figures.append(Figure(what, 5, False, unit, p99 / p50, f"{p99:.2f} ms to {p50:.2f} ms"))
    return figures


def first_admit_figures(times_ms: Sequence[float], backend: str) -> list[Figure]:
    p50, p99 = statistics.median(times_ms), statistics.quantiles(times_ms, n=100, method="inclusive")[98]
    detail = f"{len(times_ms)} users, engines of backend {backend}"
    return [
        Figure(f"first admit of a new user from the warm pool, {name}", most, False, " ms", value, detail)
        for name, most, value in (("p50", 15, p50), ("p99", 60, p99))
    ]


def cold_figures(pairs: Mapping[str, Any]) -> list[Figure]:
    figures = []
    for name, what, target, reference in (
        ("cold", "cold provision", 1.15, "bare create, start and first healthy answer"),
        ("wake", "wake from freeze", 1.5, "bare unpause and first answer"),
    ):
        found = pairs.get(name)
        detail = f"{found['platform_ms']} ms to {found['bare_ms']} ms" if found else ""
        figures.append(Figure(what, target, False, f" × {reference}", found and found["ratio"], detail))
    return figures


def round_trip_figure(found: RoundTrips) -> Figure:
    what = f"database round trips per admit of a running engine, {RATE_S:,} admits/s of one product"
    detail = f"{found.per_admit * RATE_S:.0f}/s, of which {found.idle_s:.0f}/s also when nobody calls"
    return Figure(what, 0.02, False, "", found.per_admit, detail)


def notification_figure(p99s_ms: Mapping[str, Sequence[float]]) -> Figure:
    notified, mute = p99s_ms["notified"], p99s_ms["mute"]
    ratio = statistics.median(a / b for a, b in zip(notified, mute, strict=True))
    what = f"p99 of Admit, {RATE_S:,}/s on the grpc.aio host, while {CHANGES_S} engines a second change, notified"
    detail = f"{statistics.median(notified):.2f} ms to {statistics.median(mute):.2f} ms"
    return Figure(what, 1.25, False, " × without notifications", ratio, detail)


def staleness_figures(times_ms: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Figure]:
    figures = []
    for way, what, most in (("notified", "with notifications", 100), ("mute", "with none arriving", 5000)):
        slowest = {change: max(times) for change, times in times_ms.get(way, {}).items()}
        detail = ", ".join(f"{change} {value:.0f}" for change, value in slowest.items())
        value = max(slowest.values(), default=None)
        figures.append(Figure(f"until a change is known, {what}", most, False, " ms", value, detail))
    return figures
