"""What `september up` and `september gateway` are told by their environment."""

from typing import Self

from pydantic import Field, FilePath, model_validator

from services.admission.settings import AdmissionSettings
from services.provisioner.settings import ProvisionerSettings
from services.shared.settings import (
    DrainSettings,
    IdentitySettings,
    StorageSettings,
    TracingSettings,
    check_certificate,
)
from services.shared.tls import Certificate


class EdgeSettings(TracingSettings):
    """Settings of the gateway's listeners."""

    gateway_listen: str = Field("127.0.0.1:8080", description="Address that the gateway serves REST and gRPC on.")
    gateway_admin_listen: str = Field(
        "127.0.0.1:8081", description="Address that the gateway serves operators on, apart from all others."
    )
    gateway_metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port on 127.0.0.1 of Envoy's own admin interface, whose `/stats/prometheus` has its metrics; 0 for"
        " any.",
    )
    traces_percent: float = Field(
        1, ge=0, le=100, description="Part of the calls without a `traceparent` that are traced, in percent."
    )
    gateway_cert_file: FilePath | None = Field(
        None,
        description="PEM file of the certificate that callers are shown, with the intermediate ones; without it the"
        " gateway speaks no TLS.",
    )
    gateway_key_file: FilePath | None = Field(None, description="PEM file of its private key.")

    @model_validator(mode="after")
    def _certificate_is_whole(self) -> Self:
        variables = "ORCH_GATEWAY_CERT_FILE, ORCH_GATEWAY_KEY_FILE"
        if (self.gateway_cert_file is None) != (self.gateway_key_file is None):
            raise ValueError(f"{variables}: both or none")
        certificate = self.certificate()
        if certificate is not None:
            check_certificate(certificate, variables)
        return self

    def certificate(self) -> Certificate | None:
        if self.gateway_cert_file is None or self.gateway_key_file is None:
            return None
        return Certificate(self.gateway_cert_file, self.gateway_key_file)


class GatewayAloneSettings(EdgeSettings, IdentitySettings, StorageSettings, DrainSettings):
    """Settings of a gateway by itself, on whichever machine its services are."""

    admission_addr: str = Field(
        "127.0.0.1:50051",
        description="Address of Admission, if that is not in the gateway; several are separated by commas.",
    )
    provisioner_addr: str = Field("127.0.0.1:50052", description="Address of the Provisioner, likewise.")
    boot_timeout_s: float = Field(60, gt=0, le=3600, description="How long an engine may take to become healthy.")


class UpSettings(ProvisionerSettings, AdmissionSettings, EdgeSettings):
    """Settings of all parts, which they read from one environment."""
