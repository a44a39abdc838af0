"""The errors that callers see: `{"error":{"code":"…","message":"…"}}` with an HTTP status."""

from typing import ClassVar


class EngineError(Exception):
    """An answer that is an error.

    Args:
        message: for the caller: names the field or the resource, and nothing of the inside.
        headers: sent with the answer.
    """

    status: ClassVar[int]
    code: ClassVar[str]

    def __init__(self, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.headers = headers or {}


class InvalidRequest(EngineError):
    status = 400
    code = "INVALID_REQUEST"


class InvalidEngineKey(EngineError):
    status = 401
    code = "INVALID_ENGINE_KEY"

    def __init__(self) -> None:
        # One text for missing, repeated, unknown and retired keys: nothing to enumerate.
        super().__init__("X-Engine-Key is missing or not the key of this engine")


class RouteNotFound(EngineError):
    status = 404
    code = "ROUTE_NOT_FOUND"

    def __init__(self) -> None:
        super().__init__("no such path")


class MethodNotAllowed(EngineError):
    status = 405
    code = "METHOD_NOT_ALLOWED"

    def __init__(self, allowed: str) -> None:
        super().__init__(f"this path takes {allowed} only", {"Allow": allowed})


class Internal(EngineError):
    status = 500
    code = "INTERNAL"

    def __init__(self) -> None:
        super().__init__("the engine failed to answer")


class Unavailable(EngineError):
    status = 503
    code = "UNAVAILABLE"

    def __init__(self, message: str) -> None:
        super().__init__(message, {"Retry-After": "1"})
