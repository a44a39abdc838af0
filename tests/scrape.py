"""What a process tells Prometheus, as Prometheus reads it."""

import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from tests.harness import ROOT, Service, eventually


@dataclass(frozen=True)
class Scrape:
    """One answer.

    Args:
        text: all of it.
        names: of its metrics, as documented.
        samples: numbers by name and labels.
    """

    text: str
    names: frozenset[str]
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[name, frozenset(labels.items())]


def scrape(port: int, path: str = "/metrics") -> Scrape:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        text = response.read().decode()
    families = list(text_string_to_metric_families(text))
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    return Scrape(text, frozenset(family.name for family in families), samples)


def metrics_ports(service: Service, n: int = 1) -> list[int]:
    """On which ports the service, or its `n` workers, serve their metrics."""

    def ports() -> list[int] | None:
        found = [event["port"] for event in service.events() if event["event"] == "metrics_serving"]
        return found if len(found) >= n else None

    found: list[int] = eventually(ports, "metrics are served")
    return found


def documented(*titles: str) -> set[str]:
    """Names of the metrics in docs/metrics.md, of these parts."""
    parts = (ROOT / "docs" / "metrics.md").read_text().split("\n## ")[1:]
    tables = {title: table for title, _, table in (part.partition("\n") for part in parts)}
    return {line.split("`")[1] for title in titles for line in tables[title].splitlines() if line.startswith("| `")}
