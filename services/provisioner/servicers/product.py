"""ProductService over gRPC."""

from dataclasses import asdict
from typing import Any

from google.protobuf.json_format import MessageToDict
from grpc.aio import ServicerContext

from september.provisioner.v1 import product_pb2
from september.provisioner.v1 import product_service_pb2 as pb
from september.provisioner.v1.product_service_pb2_grpc import ProductServiceServicer
from services.provisioner.domain.policy import Policy
from services.provisioner.domain.product import Registration
from services.provisioner.products import Products
from services.shared.errors import InvalidRequest
from services.shared.timestamps import to_timestamp


class ProductServicer(ProductServiceServicer):
    def __init__(self, products: Products) -> None:
        self._products = products

    async def RegisterProduct(
        self, request: pb.RegisterProductRequest, context: ServicerContext[Any, Any]
    ) -> pb.RegisterProductResponse:
        product, key = await self._products.register(request.slug, _policy_fields(request))
        return pb.RegisterProductResponse(product_id=str(product.product_id), slug=product.slug, platform_api_key=key)

    async def UpdatePolicy(
        self, request: pb.UpdatePolicyRequest, context: ServicerContext[Any, Any]
    ) -> pb.UpdatePolicyResponse:
        policy = await self._products.update_policy(request.product_id, _policy_fields(request))
        return pb.UpdatePolicyResponse(policy=_policy_message(policy))

    async def ListProducts(
        self, request: pb.ListProductsRequest, context: ServicerContext[Any, Any]
    ) -> pb.ListProductsResponse:
        limit = request.limit if request.HasField("limit") else None
        products, next_page_token = await self._products.page(limit, request.page_token)
        return pb.ListProductsResponse(
            products=[_product_message(product) for product in products], next_page_token=next_page_token
        )

    async def GetProduct(
        self, request: pb.GetProductRequest, context: ServicerContext[Any, Any]
    ) -> pb.GetProductResponse:
        return pb.GetProductResponse(product=_product_message(await self._products.get(request.product_id)))

    async def RotatePlatformKey(
        self, request: pb.RotatePlatformKeyRequest, context: ServicerContext[Any, Any]
    ) -> pb.RotatePlatformKeyResponse:
        key = await self._products.rotate_key(request.product_id, request.grace_s)
        return pb.RotatePlatformKeyResponse(platform_api_key=key)

    async def DisableProduct(
        self, request: pb.DisableProductRequest, context: ServicerContext[Any, Any]
    ) -> pb.DisableProductResponse:
        product = await self._products.set_disabled(request.product_id, True)
        return pb.DisableProductResponse(product=_product_message(product))

    async def EnableProduct(
        self, request: pb.EnableProductRequest, context: ServicerContext[Any, Any]
    ) -> pb.EnableProductResponse:
        product = await self._products.set_disabled(request.product_id, False)
        return pb.EnableProductResponse(product=_product_message(product))


def _policy_fields(request: pb.RegisterProductRequest | pb.UpdatePolicyRequest) -> dict[str, object] | None:
    try:
        return MessageToDict(request.policy) if request.HasField("policy") else None
    except ValueError as error:
        raise InvalidRequest("policy: must be JSON, which has no NaN and nothing infinite") from error


def _policy_message(policy: Policy) -> product_pb2.Policy:
    return product_pb2.Policy(**asdict(policy))


def _product_message(registration: Registration) -> product_pb2.Product:
    return product_pb2.Product(
        product_id=str(registration.product.product_id),
        slug=registration.product.slug,
        policy=_policy_message(registration.product.policy),
        created_at=to_timestamp(registration.created_at),
        disabled_at=to_timestamp(registration.disabled_at),
    )
