"""Traces of calls, told to a collector of OpenTelemetry.

A call is traced if its `traceparent` says that it is sampled; for one that brings none, the gateway
decides. Nothing is noted of any other, and nothing at all is looked at unless there is a collector.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import structlog
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.shared.errors import ServiceError
from services.shared.grpc_server import Context, Continuation, Handler

TRACEPARENT = "traceparent"
REQUEST_ID = "x-request-id"

_PROPAGATOR = TraceContextTextMapPropagator()
# Of whichever provider the process has; without one its spans are nothing.
_TRACER = trace.get_tracer("september")
_EXPORT_S = 5
# Its last digit, in which the lowest bit says so.
_SAMPLED = tuple("13579bdf")


@asynccontextmanager
async def exporting_traces(service: str, address: str | None) -> AsyncIterator[None]:
    """Sends what is traced from entry to exit. A collector that can't be reached disturbs nobody: spans are dropped.

    Args:
        service: what the spans are of.
        address: `host:port` of the collector; None for no traces.
    """
    if address is None:
        yield
        return
    # Imported here: nobody else needs the time and the memory that it takes.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

    # The collector is near; `http_proxy` is for what is far.
    options: Any = (("grpc.enable_http_proxy", 0),)
    exporter = OTLPSpanExporter(endpoint=address, insecure=True, timeout=_EXPORT_S, channel_options=options)
    provider = TracerProvider(ParentBased(root=ALWAYS_OFF), Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        await asyncio.to_thread(provider.shutdown)


@contextmanager
def span(name: str, **attributes: str) -> Iterator[None]:
    """A part of the call under way, if that is traced.

    Of what ends it no more is told than a code of the error table: messages may hold anything.
    """
    if not trace.get_current_span().is_recording():
        yield
        return
    with _recorded(name, attributes):
        yield


@contextmanager
def continued(name: str, traceparent: str | None, **attributes: str) -> Iterator[None]:
    """Goes on with a trace that began elsewhere, if it is one that is traced; its log lines have the trace's id."""
    if traceparent is None or not traceparent.endswith(_SAMPLED):
        yield
        return
    context = _PROPAGATOR.extract({TRACEPARENT: traceparent})
    with _recorded(name, attributes, context=context, kind=trace.SpanKind.SERVER) as begun:
        if begun.is_recording():
            trace_id = trace.format_trace_id(begun.get_span_context().trace_id)
            # For as long as the task lives, which is the call's own: who answers its error logs it outside of this.
            structlog.contextvars.bind_contextvars(trace_id=trace_id)
        yield


@contextmanager
def _recorded(name: str, attributes: dict[str, str], **how: Any) -> Iterator[trace.Span]:
    with _TRACER.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False, **how
    ) as begun:
        try:
            yield begun
        except BaseException as error:
            begun.set_status(trace.StatusCode.ERROR, error.code if isinstance(error, ServiceError) else None)
            raise


def onward() -> Sequence[tuple[str, str]]:
    """Metadata by which others go on with the call under way: its request id, and its trace if it is traced."""
    metadata: dict[str, str] = {}
    _PROPAGATOR.inject(metadata)
    metadata = {key: value for key, value in metadata.items() if key == TRACEPARENT}
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    if request_id is not None:
        metadata[REQUEST_ID] = request_id
    return tuple(metadata.items())


class TracingInterceptor(grpc.aio.ServerInterceptor):
    """Traces the calls of a server. Not those that are answered by streams: they may go on for ever."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        handler: Any = await continuation(handler_call_details)
        metadata = dict(handler_call_details.invocation_metadata or ())
        traceparent = metadata.get(TRACEPARENT)
        if handler is None or handler.unary_unary is None or traceparent is None:
            untraced: Handler | None = handler
            return untraced
        method = handler_call_details.method.lstrip("/")

        async def unary(request: Any, context: Context) -> Any:
            with continued(method, str(traceparent), request_id=str(metadata.get(REQUEST_ID, ""))):
                return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)


def traced(address: str | None) -> list[grpc.aio.ServerInterceptor]:
    """What a server needs whose calls may be traced: nothing, if there is no collector."""
    return [] if address is None else [TracingInterceptor()]
