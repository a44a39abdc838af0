"""A product's key on another product's ids: every call answers as it does for ids that nobody has, byte for byte."""

from typing import Any
from uuid import UUID

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from september.admission.v1 import admission_service_pb2
from september.provisioner.v1 import fleet_service_pb2, provisioner_service_pb2
from september.provisioner.v1.provisioner_service_pb2 import ProvisionEngineRequest
from tests.harness import Clients, Platform, Product, Service, reason

Shared = tuple[Platform, list[Service]]

METHODS: list[MethodDescriptor] = [
    method
    for file in (admission_service_pb2, fleet_service_pb2, provisioner_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if "user_id" in method.input_type.fields_by_name
    # Asks for an engine of the caller's own, whoever else has a user of that name.
    and method.name != "ProvisionEngine"
]
# Answers that are not errors: a denial, and an empty list.
ANSWERS = {"Admit", "EnsureEngine", "ListAuditEvents"}


async def outcome(service: Service, method: MethodDescriptor, product: Product, user_id: str) -> tuple[str, bytes]:
    """The call's code in the error table, `OK` if there is none, and all the bytes of its answer."""
    request = GetMessageClass(method.input_type)(user_id=user_id).SerializeToString()
    path = f"/{method.containing_service.full_name}/{method.name}"
    async with grpc.aio.insecure_channel(service.address) as channel:
        try:
            if method.server_streaming:
                stream: Any = channel.unary_stream(path)
                return "OK", await anext(aiter(stream(request, metadata=product.metadata, timeout=10)))
            send: Any = channel.unary_unary(path)
            return "OK", await send(request, metadata=product.metadata, timeout=10)
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            status: Any = trailing["grpc-status-details-bin"]
            return reason(error), repr((error.code(), error.details(), status, sorted(trailing))).encode()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_a_foreign_id_is_answered_as_a_missing_one(
    clients: Clients, shared: Shared, method: MethodDescriptor
) -> None:
    platform, (provisioner, admission, _) = shared
    service = admission if method.containing_service.name == "AdmissionService" else provisioner
    ours, theirs = await clients.register(), await clients.register()
    await clients.provisioner.ProvisionEngine(ProvisionEngineRequest(user_id="u1"), metadata=theirs.metadata)

    def rows() -> list[list[tuple[Any, ...]]]:
        product_id = UUID(theirs.product_id)
        return [
            platform.query(f"SELECT * FROM {table} WHERE product_id = %s ORDER BY 1", product_id)
            for table in ("engines", "operations", "audit_events")
        ]

    before = rows()
    foreign = await outcome(service, method, ours, "u1")
    assert foreign == await outcome(service, method, ours, "u0")
    assert foreign[0] == ("OK" if method.name in ANSWERS else "ENGINE_NOT_FOUND")
    assert rows() == before


def test_every_service_is_walked() -> None:
    names = {method.name for method in METHODS}
    assert {"Admit", "GetEngine", "GetEngineHistory", "StartEngine", "WatchEngine", "DestroyEngine"} <= names
