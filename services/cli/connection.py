"""How commands reach the platform: addresses, keys, channels, and what goes wrong on the way."""

import shlex
from collections import ChainMap
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import grpc

from september.admission.v1.admission_service_pb2_grpc import AdmissionServiceStub
from september.provisioner.v1.fleet_service_pb2_grpc import FleetServiceStub
from september.provisioner.v1.product_service_pb2_grpc import ProductServiceStub
from september.provisioner.v1.provisioner_service_pb2_grpc import ProvisionerServiceStub
from services.cli.failure import Failure
from services.cli.var_directory import VarDirectory
from services.shared.errors import (
    Internal,
    InvalidAdminKey,
    InvalidPlatformKey,
    InvalidRequest,
    RemoteError,
    ServiceError,
)
from services.shared.grpc_client import answered_error
from services.shared.tls import UNIX, Identity, channel

ADMISSION, PROVISIONER = "ADMISSION_ADDR", "PROVISIONER_ADDR"
_PARTS = {ADMISSION: "admission", PROVISIONER: "provisioner"}
PLATFORM_KEY, ADMIN_KEY = "PLATFORM_KEY", "ADMIN_KEY"

Metadata = tuple[tuple[str, str], ...]

_OPTIONS = (
    # A call has no deadline, since a boot has its own at the other end; who is gone is noticed by this.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
)
# What gRPC itself says while a server starts, ends, or has too much to do.
_TRANSIENT = {
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
}


class Connection:
    """Where the platform is, and the keys to show it.

    What is not given is taken from the platform that runs on this machine; but not if an address
    is given: its keys are no other platform's business.

    Args:
        given: addresses and keys by the variable's name.
        var: where the platform of this machine announces its own.
        identity: what the platform's parts are shown; None if they speak no TLS.
        idempotency_key: is shown with every call; those that change nothing ignore it.
    """

    def __init__(
        self,
        given: Mapping[str, str],
        var: VarDirectory,
        identity: Identity | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        self._identity = identity
        self._idempotency_key = idempotency_key
        elsewhere = ADMISSION in given or PROVISIONER in given
        self._given = given
        self._announced = {} if elsewhere else _announced(var)
        self._known = ChainMap(dict(given), self._announced)

    @asynccontextmanager
    async def admission(self) -> AsyncIterator[AdmissionServiceStub]:
        """Inside, AdmissionService can be called.

        Raises:
            ServiceError: what a call inside has been answered with, or why there was no answer.
        """
        async with self._channel(ADMISSION) as channel:
            yield AdmissionServiceStub(channel)

    @asynccontextmanager
    async def provisioner(self) -> AsyncIterator[ProvisionerServiceStub]:
        """Inside, ProvisionerService can be called; raises as `admission` does."""
        async with self._channel(PROVISIONER) as channel:
            yield ProvisionerServiceStub(channel)

    @asynccontextmanager
    async def fleet(self) -> AsyncIterator[FleetServiceStub]:
        """Inside, FleetService can be called; raises as `admission` does."""
        async with self._channel(PROVISIONER) as channel:
            yield FleetServiceStub(channel)

    @asynccontextmanager
    async def products(self) -> AsyncIterator[ProductServiceStub]:
        """Inside, ProductService can be called; raises as `admission` does."""
        async with self._channel(PROVISIONER) as channel:
            yield ProductServiceStub(channel)

    def platform_key(self) -> Metadata:
        """A call's metadata for a product.

        Raises:
            InvalidPlatformKey: no key is known, or it can't be one.
            InvalidRequest: the idempotency key can't be one.
        """
        key = self._known.get(PLATFORM_KEY, "")
        if not _is_sendable(key):
            raise InvalidPlatformKey
        return self._with_idempotency_key("x-platform-key", key)

    def admin_key(self) -> Metadata:
        """A call's metadata for an operator.

        Raises:
            InvalidAdminKey: no key is known, or it can't be one.
            InvalidRequest: the idempotency key can't be one.
        """
        key = self._known.get(ADMIN_KEY, "")
        if not _is_sendable(key):
            raise InvalidAdminKey
        return self._with_idempotency_key("x-admin-key", key)

    def widest_key(self) -> Metadata:
        """A call's metadata for whoever sees most: an operator, or else a product.

        A key that was given stands before one that was found.

        Raises:
            InvalidPlatformKey: no key is known, or it can't be one.
        """
        for keys in (self._given, self._announced):
            if ADMIN_KEY in keys:
                return self.admin_key()
            if PLATFORM_KEY in keys:
                break
        return self.platform_key()

    def _with_idempotency_key(self, name: str, key: str) -> Metadata:
        if self._idempotency_key is None:
            return ((name, key),)
        if not _is_sendable(self._idempotency_key):
            raise InvalidRequest("idempotency-key: must be given once, as 1 to 255 printable ASCII characters")
        return ((name, key), ("idempotency-key", self._idempotency_key))

    @asynccontextmanager
    async def _channel(self, variable: str) -> AsyncIterator[grpc.aio.Channel]:
        address = self._address(variable)
        async with channel(address, _PARTS[variable], self._identity, _OPTIONS) as opened:
            try:
                yield opened
            except grpc.aio.AioRpcError as error:
                raise _to_error(error, address) from error

    def _address(self, variable: str) -> str:
        address = self._known.get(variable)
        if address is None:
            raise RemoteError(
                "UNAVAILABLE",
                f"{variable} is not known; give it, or start the platform here with `make run` or `september up`",
            )
        if address.startswith(UNIX):
            return address
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise InvalidRequest(f"{variable}: {address!r} must be host:port or unix:/path")
        return address


def _announced(var: VarDirectory) -> dict[str, str]:
    try:
        lines = shlex.split(var.environment.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise Failure(f"{var.environment} is damaged") from None
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def _is_sendable(key: str) -> bool:
    return key != "" and key.isascii() and key.isprintable()


def _to_error(error: grpc.aio.AioRpcError, address: str) -> ServiceError:
    answered = answered_error(error)
    if answered is not None:
        return answered
    if error.code() in _TRANSIENT:
        # Without `retry_after_s`: nobody has said when.
        return RemoteError(
            "UNAVAILABLE", f"no answer from {address}; `make run` or `september up` starts the platform here"
        )
    return Internal(f"{address} answers {error.code().name}: {error.details()}")
