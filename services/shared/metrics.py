"""What a process tells Prometheus, wherever it runs.

Instruments are the process's, as loggers are: who has something to tell names them, here or in the
`metrics` of its service. No label has values that callers choose, so there are never more series
than were foreseen.
"""

from collections import Counter as Counts
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.metadata import version

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.shared.errors import ServiceError


class Tally(Collector):
    """A counter for where every microsecond counts: `tally.counts[value] += 1` takes no lock.

    To be incremented by one thread alone, that of the event loop; any may read.

    Args:
        name: of the metric, without `_total`.
        documentation: what it says.
        label: by which it counts.
        values: of the label that are known beforehand; their first increase is seen, too.
    """

    def __init__(self, name: str, documentation: str, label: str, values: Collection[str]) -> None:
        self.counts: Counts[str] = Counts(dict.fromkeys(values, 0))
        self._name = name
        self._documentation = documentation
        self._label = label
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._documentation, labels=[self._label])
        for value, count in self.counts.copy().items():
            family.add_metric([value], count)
        yield family


def foresee(instrument: Counter | Gauge | Histogram, values: Iterable[str]) -> None:
    """Makes the series of these values of its label beforehand: then their first increase is seen, too."""
    for value in values:
        instrument.labels(value)


class Pool(Collector):
    """The pool of connections, as its own statistics have it."""

    _GAUGES = (
        ("pool_size", "connections", "Connections of the pool, in use or idle."),
        ("pool_available", "connections_idle", "Connections of the pool that are idle."),
        ("requests_waiting", "waiting", "Callers that wait for a connection."),
    )
    _COUNTERS = (
        ("requests_num", "requests", "Connections that were asked for."),
        ("requests_queued", "waits", "Callers that had to wait for a connection."),
        ("requests_errors", "refusals", "Callers that got no connection in time, or at all."),
        ("connections_lost", "connections_lost", "Connections that were found broken."),
    )

    def __init__(self) -> None:
        self._statistics: Callable[[], Mapping[str, int]] = dict
        REGISTRY.register(self)

    def observe(self, statistics: Callable[[], Mapping[str, int]]) -> None:
        """From now on this is the process's pool."""
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        now = self._statistics()
        for key, name, documentation in self._GAUGES:
            yield GaugeMetricFamily(f"september_postgres_{name}", documentation, now.get(key, 0))
        for key, name, documentation in self._COUNTERS:
            yield CounterMetricFamily(f"september_postgres_{name}", documentation, now.get(key, 0))
        waited_s = now.get("requests_wait_ms", 0) / 1000
        yield CounterMetricFamily("september_postgres_wait_seconds", "Time waited for connections.", waited_s)


# A second series for each, which says no more than that the process has started.
disable_created_metrics()  # type: ignore[no-untyped-call]

BUILD = Gauge("september_build_info", "1, with the `version` that runs.", ["version"])
BUILD.labels(version("september-platform")).set(1)

ERRORS = Tally(
    "september_errors",
    "Calls that were answered with an error, by its `code`.",
    "code",
    # What another service has answered has its code from that service.
    sorted(kind.code for kind in ServiceError.__subclasses__() if hasattr(kind, "code")),
)
LOOP_LAG = Histogram(
    "september_event_loop_lag_seconds",
    "How late the event loop is, looked at four times a second.",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
REGISTRY_AGE = Gauge("september_registry_age_seconds", "Time since the registry last answered the look at it.")
REGISTRY_ERRORS = Counter(
    "september_registry_errors", "Times that the registry could not be reached, or did not answer in time."
)
LISTENER_LOSSES = Counter(
    "september_listener_losses",
    "Times that the connection for notifications was lost, by `channel`; polls go on without them.",
    ["channel"],
)
POOL = Pool()
