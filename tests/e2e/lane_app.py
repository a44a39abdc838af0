"""Admission inside of the gateway, for tests: passes every call on to the services of the test."""

import os
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import grpc

from services.admission.asgi import AdmissionApp, Event, Receive, Send, Served
from services.admission.calls import SERVICE, Call, Method
from services.admission.grpc_wire import Refused
from services.admission.lane import served
from services.shared import log
from services.shared.errors import Unavailable
from services.shared.grpc_client import answered_error
from services.shared.loops import supervise
from services.shared.service import background

# What an Admission of its own process would read, too.
_READ = {b"traceparent", b"x-admin-key", b"x-platform-key", b"x-request-id"}
_OPTIONS = (("grpc.max_receive_message_length", -1),)
_headers: ContextVar[Iterable[tuple[bytes, bytes]]] = ContextVar("headers")


def _passed_on(channel: grpc.aio.Channel, name: str) -> Method:
    unary: Any = channel.unary_unary(f"/{SERVICE}/{name}")

    async def method(request: bytes, call: Call) -> bytes:
        metadata = [(key.decode(), value.decode("latin-1")) for key, value in _headers.get() if key in _READ]
        try:
            answer: bytes = await unary(request, metadata=metadata, timeout=call.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise answered_error(error) or Refused(error.code(), error.details() or "") from None
        return answer

    return method


@asynccontextmanager
async def _core() -> AsyncIterator[Mapping[str, Served]]:
    log.configure("admission", "INFO")
    async with grpc.aio.insecure_channel(os.environ["ADMISSION"], options=_OPTIONS) as channel:
        methods = served({name: _passed_on(channel, name) for name in ("Admit", "GetEngine", "CheckHealth")}, 60)
        limit_s = os.environ.get("LIMIT_S")
        yield {path: replace(one, limit_s=float(limit_s)) for path, one in methods.items()} if limit_s else methods


_admission = AdmissionApp(_core)


async def app(scope: Event, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        _headers.set(scope["headers"])
    await _admission(scope, receive, send)


@asynccontextmanager
async def _failing_core() -> AsyncIterator[Mapping[str, Served]]:
    async def loop() -> None:
        raise RuntimeError("the loop fails")

    log.configure("admission", "INFO")
    async with background(supervise(loop=loop())):
        yield {}


failing = AdmissionApp(_failing_core)


@asynccontextmanager
async def _absent_core() -> AsyncIterator[Mapping[str, Served]]:
    raise Unavailable("the registry is not available")
    yield {}


absent = AdmissionApp(_absent_core)
