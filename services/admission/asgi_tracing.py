"""Traces of the calls that come to Admission inside of the gateway."""

from services.admission.asgi import App, Event, Receive, Send
from services.shared.tracing import REQUEST_ID, TRACEPARENT, continued

_TRACEPARENT = TRACEPARENT.encode()
_REQUEST_ID = REQUEST_ID.encode()


class TracedApp:
    """Passes every call on, and traces those whose caller traces them.

    Args:
        app: answers them.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        traceparent = headers.get(_TRACEPARENT)
        if traceparent is None:
            await self._app(scope, receive, send)
            return
        request_id = headers.get(_REQUEST_ID, b"").decode("latin-1")
        with continued(scope["path"].lstrip("/"), traceparent.decode("latin-1"), request_id=request_id):
            await self._app(scope, receive, send)
