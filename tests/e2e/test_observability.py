"""Rules and dashboard speak of what the platform really tells, in both services and the gateway."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.gateway_process import Gateway, Inside, eventually, running_gateway
from tests.harness import ROOT, Platform
from tests.scrape import documented, metrics_ports, scrape

DIRECTORY = ROOT / "deploy" / "observability"
RULES = (DIRECTORY / "rules.yml").read_text()
_TOLD = re.compile(r"\b(?:september|envoy|process)_\w+")
# Words of labels, which look like metrics.
_LABELS = {"envoy_http_conn_manager_prefix", "envoy_response_code_class"}


def spoken_of(text: str) -> set[str]:
    return set(_TOLD.findall(text)) - _LABELS


async def test_rules_and_dashboard_speak_of_what_is_told(platform: Platform, tmp_path: Path) -> None:
    provisioner = platform.provisioner(ORCH_PROVISIONER_METRICS_LISTEN="127.0.0.1:0")
    settings = {"ORCH_PROVISIONER_ADDR": provisioner.address, "ORCH_ADMISSION_METRICS_LISTEN": "127.0.0.1:0"}
    inside = Inside("services.admission.lane:app", {**platform.environment, **settings})
    async with running_gateway(tmp_path, inside, provisioner.address) as gateway:
        assert (await gateway.rest("POST", "/engines/ada/admit", b"{}", [("X-Platform-Key", "unknown")])).status == 401

        async def of_the_gateway() -> str | None:
            page = (await gateway.admin_page("/stats/prometheus")).decode()
            return page if "envoy_http_downstream_rq_time_bucket" in page else None

        [provisioner_port] = metrics_ports(provisioner)
        texts = [
            scrape(await admission_port(gateway)).text,
            scrape(provisioner_port).text,
            await eventually(of_the_gateway),
        ]
    told = {line.split()[2] for text in texts for line in text.splitlines() if line.startswith("# TYPE")}
    known = told | {name + end for name in told for end in ("_bucket", "_sum", "_count")}
    dashboard = "\n".join(target["expr"] for panel in panels() for target in panel.get("targets", ()))
    for text in (RULES, dashboard):
        assert spoken_of(text) <= known
        assert len(spoken_of(text)) > 15


async def admission_port(gateway: Gateway) -> int:
    async def port() -> int | None:
        lines = [json.loads(line) for line in gateway.log.read_text().splitlines() if line.startswith("{")]
        return next((line["port"] for line in lines if line["event"] == "metrics_serving"), None)

    return await eventually(port)


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((DIRECTORY / "dashboard.json").read_text())
    panels: list[dict[str, Any]] = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    return panels


def test_every_metric_is_in_the_dashboard() -> None:
    shown = {
        re.sub(r"_(total|bucket|count|sum)$", "", name)
        for name in spoken_of((DIRECTORY / "dashboard.json").read_text())
    }
    # How many connections were asked for says little, and how long was waited for them is seen in the calls.
    left_out = {f"september_postgres_{name}" for name in ("connections_lost", "requests", "waits", "wait_seconds")} | {
        "september_reconciler_strays_removed"
    }
    assert documented("Both services", "Admission", "Provisioner") - shown == left_out


def test_for_every_alert_it_is_written_what_to_do() -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page.split("## Alerts")[1], re.MULTILINE) == re.findall(r"alert: (\w+)", RULES)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
@pytest.mark.parametrize("check", ["check config prometheus.yml", "check rules rules.yml", "test rules rules.test.yml"])
def test_promtool_is_content(check: str) -> None:
    subprocess.run(["promtool", *check.split()], cwd=DIRECTORY, check=True)
