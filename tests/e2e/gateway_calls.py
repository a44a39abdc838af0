"""Every method that callers may use, as REST and as gRPC: what the contract says of the gateway's paths."""

import json
import re
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from september.admission.v1 import admission_service_pb2
from september.provisioner.v1 import fleet_service_pb2, product_service_pb2, provisioner_service_pb2

# What waits for an engine, and so for longer than the others.
BOOTS = ["Admit", "ProvisionEngine", "StartEngine", "WakeEngine", "RotateEngineKey"]
CHANGES = [*BOOTS, "DestroyEngine", "StopEngine", "SleepEngine"]


@dataclass(frozen=True)
class Method:
    """A method.

    Args:
        service: its descriptor's owner.
        name: as in the proto.
        rest: verb and path; the braces hold the field by which tests know a call.
        body: that field, if it is in the body.
    """

    service: Any
    name: str
    rest: str
    body: str = ""

    @property
    def grpc_path(self) -> str:
        return f"/{self.service.full_name}/{self.name}"

    @property
    def is_admission(self) -> bool:
        return bool(self.service.name == "AdmissionService")

    @property
    def key_field(self) -> str:
        named = re.search(r"\{(\w+)\}", self.rest)
        return named[1] if named else self.body

    def key(self, wanted: str) -> str:
        """How a test knows the call: by the wanted id, or by nothing if the method has no id."""
        return wanted if self.key_field else ""

    def request(self, key: str) -> Message:
        fields = {self.key_field: key} if self.key_field else {}
        return GetMessageClass(self.service.methods_by_name[self.name].input_type)(**fields)

    def rest_call(self, key: str) -> tuple[str, str, bytes | None]:
        """Verb, path and body."""
        verb, path = self.rest.split()
        return verb, re.sub(r"\{\w+\}", key, path), json.dumps({self.body: key}).encode() if self.body else None


_ADMISSION = admission_service_pb2.DESCRIPTOR.services_by_name["AdmissionService"]
_PROVISIONER = provisioner_service_pb2.DESCRIPTOR.services_by_name["ProvisionerService"]
_FLEET = fleet_service_pb2.DESCRIPTOR.services_by_name["FleetService"]
_PRODUCTS = product_service_pb2.DESCRIPTOR.services_by_name["ProductService"]
SERVICES = [_ADMISSION, _PROVISIONER, _FLEET, _PRODUCTS]

WATCH = Method(_PROVISIONER, "WatchEngine", "GET /engines/{user_id}/watch")
UNARY = [
    Method(_ADMISSION, "Admit", "POST /engines/{user_id}/admit"),
    Method(_ADMISSION, "GetEngine", "GET /engines/{user_id}"),
    Method(_ADMISSION, "CheckHealth", "GET /health"),
    Method(_PROVISIONER, "ProvisionEngine", "POST /engines/provision", body="user_id"),
    Method(_PROVISIONER, "DestroyEngine", "DELETE /engines/{user_id}"),
    Method(_PROVISIONER, "StartEngine", "POST /engines/{user_id}/start"),
    Method(_PROVISIONER, "StopEngine", "POST /engines/{user_id}/stop"),
    Method(_PROVISIONER, "SleepEngine", "POST /engines/{user_id}/sleep"),
    Method(_PROVISIONER, "WakeEngine", "POST /engines/{user_id}/wake"),
    Method(_PROVISIONER, "RotateEngineKey", "POST /engines/{user_id}/rotate-key"),
    Method(_FLEET, "ListEngines", "GET /engines?page_token={page_token}"),
    Method(_FLEET, "GetFleetStatus", "GET /status"),
    Method(_FLEET, "GetFleetMetrics", "GET /metrics"),
    Method(_FLEET, "GetEngineHistory", "GET /engines/{user_id}/history"),
    Method(_FLEET, "ListAuditEvents", "GET /audit?page_token={page_token}"),
    Method(_PRODUCTS, "RegisterProduct", "POST /products/register", body="slug"),
    Method(_PRODUCTS, "UpdatePolicy", "PUT /products/{product_id}/policy"),
    Method(_PRODUCTS, "ListProducts", "GET /products?page_token={page_token}"),
    Method(_PRODUCTS, "GetProduct", "GET /products/{product_id}"),
    Method(_PRODUCTS, "RotatePlatformKey", "POST /products/{product_id}/rotate-key"),
    Method(_PRODUCTS, "DisableProduct", "POST /products/{product_id}/disable"),
    Method(_PRODUCTS, "EnableProduct", "POST /products/{product_id}/enable"),
]
METHODS = {method.name: method for method in [*UNARY, WATCH]}
