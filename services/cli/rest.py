"""Calls of the gateway's REST interface, for what runs on the same host."""

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

from services.cli.failure import Failure

_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Listener:
    """One of the gateway's.

    Args:
        address: its `host:port`.
        certificate: file of the one that it must show, whatever names are in it; None if it speaks no TLS.
    """

    address: str
    certificate: Path | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self.certificate is None else 'https'}://{self.address}"

    def call(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: object = None
    ) -> tuple[int, Any]:
        """The status and the decoded JSON of an answer.

        Args:
            body: sent as JSON, if there is one.

        Raises:
            Failure: no answer, or none in JSON.
        """
        connection = self._connection()
        try:
            connection.request(method, path, None if body is None else json.dumps(body), dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, HTTPException, ValueError) as error:
            raise Failure(f"the gateway at {self.address} does not answer") from error
        finally:
            connection.close()

    def _connection(self) -> HTTPConnection:
        if self.certificate is None:
            return HTTPConnection(self.address, timeout=_TIMEOUT_S)
        context = ssl.create_default_context(cafile=self.certificate)
        # This very certificate is enough: it need not name this host, nor be one that signs others.
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return HTTPSConnection(self.address, timeout=_TIMEOUT_S, context=context)
