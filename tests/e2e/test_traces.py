"""A call is followed through all parts, by its trace and by its request id."""

import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from services.cli.gateway import Lane
from tests.e2e.gateway_process import Answer, Gateway, Inside, eventually, placed, running_gateway
from tests.e2e.gateway_services import running_services
from tests.harness import Clients, Platform, Product, Service

WAYS = ("gateway", "admission", "provisioner")


@dataclass
class Collector(TraceServiceServicer):
    """Takes the spans of all parts, as a real one does."""

    spans: list[tuple[str, Span]] = field(default_factory=list)
    text: str = ""
    address: str = ""

    async def Export(  # noqa: N802 - the protocol has it so
        self, request: pb.ExportTraceServiceRequest, context: Any
    ) -> pb.ExportTraceServiceResponse:
        self.text += str(request)
        for of in request.resource_spans:
            service = next(a.value.string_value for a in of.resource.attributes if a.key == "service.name")
            self.spans += [(service, span) for scope in of.scope_spans for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> list[tuple[str, Span]]:
        return [(service, span) for service, span in self.spans if span.trace_id.hex() == trace_id]


@dataclass
class Traced:
    """A platform whose parts all tell the collector."""

    collector: Collector
    gateway: Gateway
    provisioner: Service
    product: Product
    admission_log: Callable[[], list[dict[str, Any]]]

    async def admit(self, user_id: str, *traceparent: str) -> Answer:
        headers = [("X-Platform-Key", self.product.key), *(("traceparent", value) for value in traceparent)]
        return await self.gateway.rest("POST", f"/engines/{user_id}/admit", b'{"auto_provision":true}', headers)


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    collector, server = Collector(), grpc.aio.server()
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield collector
    await server.stop(None)


@pytest.fixture(params=Lane)
async def traced(
    request: pytest.FixtureRequest,
    platform: Platform,
    collector: Collector,
    connect: Callable[..., Clients],
    tmp_path: Path,
) -> AsyncIterator[Traced]:
    platform.environment["ORCH_TRACES_ADDR"] = collector.address
    provisioner = platform.provisioner()
    admission: str | Inside
    if request.param is Lane.GRPC:
        behind = platform.admission(provisioner)
        admission, read_log = behind.address, behind.events
    else:
        environment = {**platform.environment, "ORCH_PROVISIONER_ADDR": provisioner.address}
        admission = Inside("services.admission.lane:app", environment)

        def read_log() -> list[dict[str, Any]]:
            return [json.loads(line) for line in gateway.log.read_text().splitlines() if line.startswith("{")]

    product = await connect(platform, provisioner).register(max_engines=2)
    told = {"collector": collector.address, "traces_percent": 0}
    async with running_gateway(tmp_path, admission, provisioner.address, flushed_often, **told) as gateway:
        yield Traced(collector, gateway, provisioner, product, read_log)


def flushed_often(config: str) -> str:
    layer = "{name: test, static_layer: {tracing.opentelemetry.flush_interval_ms: 100}}"
    return f"{config}\nlayered_runtime: {{layers: [{layer}]}}\n"


def new_trace() -> tuple[str, str]:
    """An id, and an id of a span of its caller's."""
    return secrets.token_hex(16), secrets.token_hex(8)


async def test_a_call_is_one_trace_through_all_parts_and_has_one_request_id(traced: Traced) -> None:
    collector = traced.collector
    trace_id, span_id = new_trace()
    unsampled, _ = new_trace()
    await traced.admit("somebody", f"00-{unsampled}-{span_id}-02")
    await traced.admit("somebody")
    # The second bit of the flags says something else.
    made = await traced.admit("olga", f"00-{trace_id}-{span_id}-03")
    assert made.json()["admitted"] is True

    async def whole() -> bool:
        return {service for service, _ in collector.trace(trace_id)} == set(WAYS) and not parentless()

    def parentless() -> set[str]:
        spans = [span for _, span in collector.trace(trace_id)]
        return {span.parent_span_id.hex() for span in spans} - {span.span_id.hex() for span in spans} - {span_id}

    await eventually(whole)
    names = {(service, span.name) for service, span in collector.trace(trace_id)}
    assert names >= {
        ("admission", "september.admission.v1.AdmissionService/Admit"),
        ("provisioner", "september.provisioner.v1.ProvisionerService/EnsureEngine"),
        ("provisioner", "operation provision"),
        ("provisioner", "backend create"),
        ("provisioner", "backend start"),
        ("provisioner", "probe until healthy"),
    }
    # Of those that were not to be traced there is nothing.
    assert {span.trace_id.hex() for _, span in collector.spans} == {trace_id}
    # No id in hexadecimal has the user's name in it by chance.
    for secret in (traced.product.key, made.json()["engine"]["api_key"], "olga", "sk-sept-"):
        assert secret not in collector.text

    request_id = made.header("x-request-id")
    [finished] = [e for e in traced.provisioner.events() if e["event"] == "operation_finished" and "trace_id" in e]
    assert (finished["request_id"], finished["trace_id"]) == (request_id, trace_id)

    refused = await traced.admit("bob", f"00-{trace_id}-{span_id}-01")
    assert refused.error()[1] == "QUOTA_EXCEEDED"
    request_id = refused.header("x-request-id")

    async def written() -> list[dict[str, Any]] | None:
        logs = (traced.gateway.calls(), traced.admission_log(), traced.provisioner.events())
        lines = [[line for line in log if line.get("request_id") == request_id] for log in logs]
        return [line for found in lines for line in found] if all(lines) else None

    lines = await eventually(written)
    assert {(line["service"], line["trace_id"]) for line in lines} == {(way, trace_id) for way in WAYS}


@pytest.mark.parametrize("lane", Lane)
async def test_of_those_that_nobody_traces_as_many_are_traced_as_told(
    lane: Lane, collector: Collector, tmp_path: Path
) -> None:
    async with running_services() as services:
        way = placed(lane, services.address)
        told = {"collector": collector.address, "traces_percent": 100}
        async with running_gateway(tmp_path, way, services.address, flushed_often, **told) as gateway:

            async def came_as(*traceparent: str) -> str:
                key = secrets.token_hex(8)
                headers = [("X-Platform-Key", "k"), *(("traceparent", value) for value in traceparent)]
                await gateway.rest("POST", f"/engines/{key}/admit", b"{}", headers)
                [value] = services.calls[key][0].values("traceparent")
                return str(value)

            trace_id, span_id = new_trace()
            assert (await came_as()).endswith("-01")
            # Its caller has decided.
            assert (await came_as(f"00-{trace_id}-{span_id}-00")).endswith("-00")


async def test_a_collector_that_is_gone_disturbs_nobody(traced: Traced, collector: Collector) -> None:
    trace_id, span_id = new_trace()
    collector.Export = _refuses  # type: ignore[method-assign]
    for _ in range(3):
        assert (await traced.admit("ada", f"00-{trace_id}-{span_id}-01")).json()["admitted"] is True


async def _refuses(request: Any, context: Any) -> Any:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
