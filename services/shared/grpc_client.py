"""What a gRPC client of another service of the platform has to know."""

import grpc
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from services.shared.errors import RemoteError
from services.shared.grpc_server import ERROR_DOMAIN


def answered_error(error: grpc.aio.AioRpcError) -> RemoteError | None:
    """The error of the table that the service has answered with; None if the error is gRPC's own."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    info, retry = ErrorInfo(), RetryInfo()
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
        detail.Unpack(retry)
    if status is None or info.domain != ERROR_DOMAIN:
        return None
    retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None
    return RemoteError(info.reason, status.message, retry_after_s=retry_after_s)
