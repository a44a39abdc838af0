"""The connection to the container service."""

from docker import APIClient
from docker.utils import kwargs_from_env


def connected(timeout_s: float, base_url: str | None = None) -> APIClient:
    """A client of the daemon that the environment names; the connection is tried at once.

    Args:
        timeout_s: seconds for each read and write on the socket.
        base_url: address of the daemon; None for that of the environment.

    Raises:
        What `docker_errors.translated` translates.
    """
    environment = kwargs_from_env()
    return APIClient(
        base_url or environment.get("base_url"),
        timeout=timeout_s,  # type: ignore[arg-type]  # declared as a whole number
        tls=environment.get("tls", False),
    )
