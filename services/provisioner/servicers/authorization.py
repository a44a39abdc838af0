"""Who is calling, and that they may."""

from contextvars import ContextVar
from uuid import UUID

import grpc

from services.provisioner.domain.product import Product
from services.provisioner.products import Products
from services.shared.authorization import ROLES, Role
from services.shared.grpc_server import Context, Continuation, Handler, caller_address, guarded, metadata_values

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
            address = caller_address(context)
            if role is Role.ADMIN:
                await self._products.authenticate_admin(admin_keys, address)
                _caller.set(None)
            elif role is Role.PRODUCT_OR_ADMIN:
                _caller.set(await self._products.authenticate_either(platform_keys, admin_keys, address))
            else:
                _caller.set(await self._products.authenticate(platform_keys, address))

        return guarded(handler, authorize)
