"""What Docker's errors mean."""

from collections.abc import Iterator
from contextlib import contextmanager

from docker.errors import APIError, DockerException
from requests import RequestException

from services.shared.errors import BackendError, Unavailable


@contextmanager
def translated() -> Iterator[None]:
    """Turns Docker's errors into the callers'; what Docker said stays in the cause, which is logged."""
    try:
        yield
    except APIError as exc:
        # 404 and conflicts: something changed under the call, and a repeated one will see it.
        if is_conflict(exc) or exc.status_code in (404, 503):
            raise Unavailable("the engine is busy with another operation") from exc
        raise BackendError("the container service refused the engine") from exc
    except (DockerException, RequestException) as exc:
        raise Unavailable("the container service can't be reached") from exc


def is_conflict(error: APIError) -> bool:
    """Another call got ahead; 403 is what a network says whose bridge there is already."""
    return error.status_code in (403, 409)


def is_refused(error: APIError) -> bool:
    """The daemon has tried, and the host did not let it."""
    return bool(error.status_code == 500)


def is_port_refused(error: APIError) -> bool:
    """Docker has no code for it: only the text says whether a container or a process has the port."""
    return _says(error, "port is already allocated") or _says(error, "address already in use")


def is_network_gone(error: APIError) -> bool:
    """The container's network is not there any more, nor is another of its name the same."""
    return error.status_code == 404 and _says(error, "network")


def is_not_paused(error: APIError) -> bool:
    return _says(error, "is not paused")


def _says(error: APIError, text: str) -> bool:
    return text in str(error.explanation).lower()
