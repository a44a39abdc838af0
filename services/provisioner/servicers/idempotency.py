"""Calls that show an idempotency key are answered once and for all."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc

from services.provisioner.domain.idempotency import KeyedCall
from services.provisioner.servicers.authorization import calling_scope
from services.shared.failpoints import reached
from services.shared.grpc_server import Context, Continuation, Handler, metadata_values

Act = Callable[[], Awaitable[bytes]]

_PROVISIONER = "/september.provisioner.v1.ProvisionerService/"
_PRODUCT = "/september.provisioner.v1.ProductService/"
THROUGH_OPERATION = (
    _PROVISIONER + "ProvisionEngine",
    _PROVISIONER + "DestroyEngine",
    _PROVISIONER + "StartEngine",
    _PROVISIONER + "StopEngine",
    _PROVISIONER + "SleepEngine",
    _PROVISIONER + "WakeEngine",
    _PROVISIONER + "RotateEngineKey",
)
IN_TRANSACTION = (
    _PRODUCT + "RegisterProduct",
    _PRODUCT + "UpdatePolicy",
    _PRODUCT + "RotatePlatformKey",
    _PRODUCT + "DisableProduct",
    _PRODUCT + "EnableProduct",
)


class Keys(Protocol):
    """Makes the answer of a call, or finds it; see the store."""

    async def through_operation(self, call: KeyedCall, act: Act) -> bytes: ...
    async def in_transaction(self, call: KeyedCall, act: Act) -> bytes: ...


class IdempotencyInterceptor(grpc.aio.ServerInterceptor):
    """Gives a repeated call its first answer. Runs within the authorization: a key is its caller's own."""

    def __init__(self, keys: Keys) -> None:
        self._answers = {
            **dict.fromkeys(THROUGH_OPERATION, keys.through_operation),
            **dict.fromkeys(IN_TRANSACTION, keys.in_transaction),
        }

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler: Any = await continuation(handler_call_details)
        method = handler_call_details.method
        answer = self._answers.get(method)
        if answer is None or handler is None:
            unchanged: Handler | None = handler
            return unchanged

        async def unary(request: Any, context: Context) -> bytes:
            async def act() -> bytes:
                serialized: bytes = handler.response_serializer(await handler.unary_unary(request, context))
                return serialized

            keys = metadata_values(context, "idempotency-key")
            if not keys:
                return await act()
            # The maps of a policy in an order of their own.
            body = request.SerializeToString(deterministic=True)
            kept = await answer(KeyedCall.of(calling_scope(), keys, method, body), act)
            reached("key.kept")
            return kept

        return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, None)
