"""The errors that callers see.

Raise one of these anywhere; the gRPC server turns it into a `google.rpc.Status`. The class
attribute `code` is a name of the error table in `proto/september/errors/v1/errors.proto`, which
alone knows the gRPC and HTTP statuses.
"""


class ServiceError(Exception):
    """An answer that is an error.

    Args:
        message: for the caller: names the field or the resource, and nothing of the inside.
        retry_after_s: seconds after which a retry may succeed, where waiting helps.
    """

    code: str

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequest(ServiceError):
    code = "INVALID_REQUEST"


class InvalidPlatformKey(ServiceError):
    code = "INVALID_PLATFORM_KEY"

    def __init__(self) -> None:
        # One text for missing, repeated, malformed, unknown and revoked keys: nothing to enumerate.
        super().__init__("x-platform-key is missing or not a valid platform key")


class InvalidAdminKey(ServiceError):
    code = "INVALID_ADMIN_KEY"

    def __init__(self) -> None:
        super().__init__("x-admin-key is missing or not the admin key")


class PolicyDenied(ServiceError):
    code = "POLICY_DENIED"


class EngineNotFound(ServiceError):
    code = "ENGINE_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("no engine for this user_id")


class ProductNotFound(ServiceError):
    code = "PRODUCT_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("no product with this product_id")


class EngineAlreadyExists(ServiceError):
    code = "ENGINE_ALREADY_EXISTS"


class EngineNotRunning(ServiceError):
    code = "ENGINE_NOT_RUNNING"


class EngineAlreadyRunning(ServiceError):
    code = "ENGINE_ALREADY_RUNNING"


class ProductSlugExists(ServiceError):
    code = "PRODUCT_SLUG_EXISTS"


class IdempotencyConflict(ServiceError):
    code = "IDEMPOTENCY_CONFLICT"


class RateLimited(ServiceError):
    code = "RATE_LIMITED"


class QuotaExceeded(ServiceError):
    code = "QUOTA_EXCEEDED"


class Internal(ServiceError):
    code = "INTERNAL"


class BackendError(ServiceError):
    code = "BACKEND_ERROR"


class PortExhaustion(ServiceError):
    code = "PORT_EXHAUSTION"


class Unavailable(ServiceError):
    code = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class BootTimeout(ServiceError):
    code = "BOOT_TIMEOUT"


class RemoteError(ServiceError):
    """An error that another service has answered, to be passed on as it is."""

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = code
