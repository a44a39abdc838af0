"""The Provisioner over gRPC."""

import asyncio
import json
import time
from datetime import UTC
from uuid import UUID

import grpc

from september.engine.v1 import denial_pb2, engine_pb2
from september.provisioner.v1.provisioner_service_pb2 import EnsureEngineRequest, EnsureEngineResponse
from september.provisioner.v1.provisioner_service_pb2_grpc import ProvisionerServiceStub
from services.admission.domain import DenialReason, Engine, EngineStatus
from services.admission.metrics import PROVISIONER_CALLS
from services.shared.errors import BootTimeout, ServiceError, Unavailable
from services.shared.grpc_client import answered_error
from services.shared.tls import Identity, channel
from services.shared.tracing import onward

# After its timeout a failed boot is undone before it is answered.
_MARGIN_S = 20.0
# While one has just come back and another says that it goes, none is connected for a moment.
_CHANGEOVER_S = 1.0
_POLL_S = 0.02
_UNREACHABLE = "the provisioner can't be reached"
_OPTIONS = (
    # The Provisioner is near; `http_proxy` is for what is far.
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Of every ping: the keepalive waits for those that measure the connection, which have a minute otherwise.
    ("grpc.http2.ping_timeout_ms", 5_000),
    # A restarted Provisioner is found again well within the changeover.
    ("grpc.max_reconnect_backoff_ms", 300),
    # How long one may take to connect; what hangs takes connections, too, and says nothing.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # All that serve, in turn: one that is about to end says so by its health.
    (
        "grpc.service_config",
        json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}),
    ),
)


class ProvisionerClient:
    """Args:
    address: of the Provisioner, `host:port` or `unix:` and a path; several are separated by commas.
    boot_timeout_s: how long a boot may take, in seconds.
    identity: what the Provisioner is shown; None if it speaks no TLS.
    """

    def __init__(self, address: str, *, boot_timeout_s: float, identity: Identity | None = None) -> None:
        self._address = address
        self._identity = identity
        self._patience_s = boot_timeout_s + _MARGIN_S
        self._calls: set[asyncio.Task[EnsureEngineResponse]] = set()
        # Ends once some Provisioner is connected again.
        self._outage: asyncio.Task[None] | None = None
        self._patient_until = 0.0
        self._channel: grpc.aio.Channel

    async def open(self) -> None:
        self._channel = channel(self._address, "provisioner", self._identity, _OPTIONS)
        self._stub = ProvisionerServiceStub(self._channel)

    async def close(self) -> None:
        if self._outage is not None:
            self._outage.cancel()
        await self._channel.close()

    async def ensure(
        self, platform_key: str, user_id: str, *, auto_provision: bool, auto_wake: bool, timeout_s: float | None
    ) -> Engine | DenialReason:
        """See `services.admission.admit.Provisioner`.

        The call goes on if whoever waits for it goes away: an engine that was asked for is made.
        """
        request = EnsureEngineRequest(user_id=user_id, auto_provision=auto_provision, auto_wake=auto_wake)
        call = asyncio.create_task(self._ensure(request, platform_key))
        self._calls.add(call)
        call.add_done_callback(self._forget)
        try:
            async with asyncio.timeout(timeout_s):
                response = await asyncio.shield(call)
        except TimeoutError as error:
            if not self._is_connected():
                raise Unavailable(_UNREACHABLE) from error
            raise BootTimeout("the engine is still booting; call again to join the boot") from error
        if response.WhichOneof("outcome") == "denial":
            return DenialReason(denial_pb2.Denial.Reason.Name(response.denial))
        return _to_engine(response.engine)

    async def _ensure(self, request: EnsureEngineRequest, platform_key: str) -> EnsureEngineResponse:
        begun, result = time.monotonic(), "answered"
        try:
            return await self._answered(request, platform_key)
        except grpc.aio.AioRpcError as error:
            answer = answered_error(error)
            result = "unreachable" if answer is None else "refused"
            raise answer or _to_error(error) from error
        finally:
            PROVISIONER_CALLS.labels(result).observe(time.monotonic() - begun)

    async def _answered(self, request: EnsureEngineRequest, platform_key: str) -> EnsureEngineResponse:
        metadata = (("x-platform-key", platform_key), *onward())
        try:
            return await self._stub.EnsureEngine(request, timeout=self._patience_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            is_lost = error.code() is grpc.StatusCode.UNAVAILABLE and answered_error(error) is None
            if not is_lost or not await self._connected():
                raise
        # Its Provisioner has gone away meanwhile. Another finds what it has begun, and joins it.
        return await self._stub.EnsureEngine(request, timeout=self._patience_s, metadata=metadata)

    async def _connected(self) -> bool:
        """Whether some Provisioner is within the time of a changeover, which begins with the first call that is lost.

        All whose calls are lost look out for one together: it is on the loop that admits to running engines.
        """
        if self._outage is None or self._outage.done():
            self._outage = asyncio.create_task(self._until_connected())
            self._patient_until = time.monotonic() + _CHANGEOVER_S
        over, _ = await asyncio.wait([self._outage], timeout=self._patient_until - time.monotonic())
        return bool(over)

    async def _until_connected(self) -> None:
        # To wait for a change would hold on to something until the state changes.
        while not self._is_connected():  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)

    def _is_connected(self) -> bool:
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    def _forget(self, call: asyncio.Task[EnsureEngineResponse]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            # Whoever would have been told may be gone.
            call.exception()


def _to_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """For callers, what gRPC says that is no answer of the Provisioner."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return BootTimeout("the engine was not ready in time")
    return Unavailable(_UNREACHABLE)


def _to_engine(message: engine_pb2.Engine) -> Engine:
    return Engine(
        engine_id=UUID(message.engine_id),
        user_id=message.user_id,
        status=EngineStatus(engine_pb2.Engine.Status.Name(message.status)),
        url=message.url,
        api_key=message.api_key,
        engine_version=message.engine_version,
        created_at=message.created_at.ToDatetime(UTC),
        last_health_at=message.last_health_at.ToDatetime(UTC) if message.HasField("last_health_at") else None,
    )
