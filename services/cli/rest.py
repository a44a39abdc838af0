"""Calls of the gateway's REST interface, for what runs on the same host."""

import json
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException
from typing import Any

from services.cli.failure import Failure

_TIMEOUT_S = 15.0


def call(
    address: str, method: str, path: str, headers: Mapping[str, str] | None = None, body: object = None
) -> tuple[int, Any]:
    """The status and the decoded JSON of an answer.

    Args:
        address: the gateway's `host:port`.
        body: sent as JSON, if there is one.

    Raises:
        Failure: no answer, or none in JSON.
    """
    connection = HTTPConnection(address, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, HTTPException, ValueError) as error:
        raise Failure(f"the gateway at {address} does not answer") from error
    finally:
        connection.close()
