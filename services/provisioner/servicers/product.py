"""ProductService over gRPC."""

from typing import Any

from google.protobuf.json_format import MessageToDict
from grpc.aio import ServicerContext

from september.provisioner.v1 import product_pb2
from september.provisioner.v1 import product_service_pb2 as pb
from september.provisioner.v1.product_service_pb2_grpc import ProductServiceServicer
from services.provisioner.products import Products


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
        return pb.UpdatePolicyResponse(
            policy=product_pb2.Policy(
                max_engines=policy.max_engines,
                rate_limit_rpm=policy.rate_limit_rpm,
                allowed_images=policy.allowed_images,
            )
        )


def _policy_fields(request: pb.RegisterProductRequest | pb.UpdatePolicyRequest) -> dict[str, object] | None:
    return MessageToDict(request.policy) if request.HasField("policy") else None
