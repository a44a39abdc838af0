"""Who may call what: one table, and nothing that is not in it."""

from contextvars import ContextVar
from enum import Enum, auto

import grpc

from services.provisioner.domain.product import Product
from services.provisioner.products import Products
from services.shared.grpc_server import Context, Continuation, Handler, guarded, metadata_values


class Role(Enum):
    ANYONE = auto()
    PRODUCT = auto()
    ADMIN = auto()


_PROVISIONER = "/september.provisioner.v1.ProvisionerService/"
_PRODUCT = "/september.provisioner.v1.ProductService/"
ROLES = {
    "/grpc.health.v1.Health/Check": Role.ANYONE,
    "/grpc.health.v1.Health/Watch": Role.ANYONE,
    _PROVISIONER + "ProvisionEngine": Role.PRODUCT,
    _PROVISIONER + "DestroyEngine": Role.PRODUCT,
    _PROVISIONER + "StartEngine": Role.PRODUCT,
    _PROVISIONER + "StopEngine": Role.PRODUCT,
    _PROVISIONER + "SleepEngine": Role.PRODUCT,
    _PROVISIONER + "WakeEngine": Role.PRODUCT,
    _PROVISIONER + "RotateEngineKey": Role.PRODUCT,
    _PROVISIONER + "WatchEngine": Role.PRODUCT,
    _PROVISIONER + "EnsureEngine": Role.PRODUCT,
    _PRODUCT + "RegisterProduct": Role.ADMIN,
    _PRODUCT + "UpdatePolicy": Role.ADMIN,
    _PRODUCT + "ListProducts": Role.ADMIN,
    _PRODUCT + "GetProduct": Role.ADMIN,
    _PRODUCT + "RotatePlatformKey": Role.ADMIN,
    _PRODUCT + "DisableProduct": Role.ADMIN,
    _PRODUCT + "EnableProduct": Role.ADMIN,
}

_caller: ContextVar[Product] = ContextVar("caller")


def calling_product() -> Product:
    """The product whose key the call under way has shown."""
    return _caller.get()


class AuthorizationInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call through only with the key of its method's role; a method without a role is unknown."""

    def __init__(self, products: Products) -> None:
        self._products = products

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        handler = await continuation(handler_call_details)
        role = ROLES.get(handler_call_details.method)
        if role is Role.ANYONE:
            return handler
        if role is None or handler is None:
            return None

        async def authorize(context: Context) -> None:
            if role is Role.ADMIN:
                self._products.authenticate_admin(metadata_values(context, "x-admin-key"))
            else:
                _caller.set(await self._products.authenticate(metadata_values(context, "x-platform-key")))

        return guarded(handler, authorize)
