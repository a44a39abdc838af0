"""Who may call what: one table, and nothing that is not in it."""

from contextvars import ContextVar
from enum import Enum, auto
from uuid import UUID

import grpc

from services.provisioner.domain.product import Product
from services.provisioner.products import Products
from services.shared.grpc_server import Context, Continuation, Handler, guarded, metadata_values


class Role(Enum):
    ANYONE = auto()
    PRODUCT = auto()
    ADMIN = auto()
    # Products see their own, operators all.
    PRODUCT_OR_ADMIN = auto()


_PROVISIONER = "/september.provisioner.v1.ProvisionerService/"
_PRODUCT = "/september.provisioner.v1.ProductService/"
_FLEET = "/september.provisioner.v1.FleetService/"
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
    _FLEET + "ListEngines": Role.PRODUCT_OR_ADMIN,
    _FLEET + "GetFleetStatus": Role.PRODUCT_OR_ADMIN,
    _FLEET + "GetFleetMetrics": Role.PRODUCT_OR_ADMIN,
    _FLEET + "ListAuditEvents": Role.PRODUCT_OR_ADMIN,
    _FLEET + "GetEngineHistory": Role.PRODUCT,
}

# None for an operator.
_caller: ContextVar[Product | None] = ContextVar("caller")


def calling_product() -> Product:
    """The product whose key the call under way has shown."""
    product = _caller.get()
    assert product is not None, "the method's role is not for operators"
    return product


def calling_scope() -> UUID | None:
    """The product that is calling, and to whose engines and events the call is confined; None for operators."""
    product = _caller.get()
    return None if product is None else product.product_id


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
            platform_keys, admin_keys = (metadata_values(context, name) for name in ("x-platform-key", "x-admin-key"))
            if role is Role.ADMIN:
                self._products.authenticate_admin(admin_keys)
                _caller.set(None)
            elif role is Role.PRODUCT_OR_ADMIN:
                _caller.set(await self._products.authenticate_either(platform_keys, admin_keys))
            else:
                _caller.set(await self._products.authenticate(platform_keys))

        return guarded(handler, authorize)
