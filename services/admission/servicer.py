"""AdmissionService over gRPC."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc
from grpc.aio import ServicerContext

from services.admission.calls import KEY_HEADER, SERVICE, AdmissionCalls, Call, Method
from services.shared.grpc_server import caller_address, metadata_values

_Handler = Callable[[bytes, "ServicerContext[Any, Any]"], Awaitable[bytes]]


def handlers(calls: AdmissionCalls) -> grpc.GenericRpcHandler:
    """The service, for a server of `grpc.aio`; answers go out as the bytes that they are."""
    return grpc.method_handlers_generic_handler(
        SERVICE, {name: grpc.unary_unary_rpc_method_handler(_served(method)) for name, method in calls.methods.items()}
    )


def _served(method: Method) -> _Handler:
    async def handler(request: bytes, context: "ServicerContext[Any, Any]") -> bytes:
        keys = metadata_values(context, KEY_HEADER)
        return await method(request, Call(keys, context.time_remaining(), partial(caller_address, context)))

    return handler
