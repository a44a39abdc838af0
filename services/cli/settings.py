"""What `september up` is told by its environment."""

from pydantic import Field

from services.admission.settings import AdmissionSettings
from services.provisioner.settings import ProvisionerSettings


class UpSettings(ProvisionerSettings, AdmissionSettings):
    """Settings of all parts, which they read from one environment."""

    gateway_listen: str = Field("127.0.0.1:8080", description="Address that the gateway serves REST and gRPC on.")
