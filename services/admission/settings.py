"""What Admission is told by its environment."""

from typing import Self

from pydantic import Field, model_validator

from services.shared.settings import CommonSettings
from services.shared.tls import UNIX


class AdmissionSettings(CommonSettings):
    """Settings of Admission."""

    admission_listen: str = Field(
        "127.0.0.1:50051", description="Address that Admission serves gRPC on: `host:port` or `unix:/path`."
    )
    provisioner_addr: str = Field(
        "127.0.0.1:50052",
        description="Address of the Provisioner, likewise; several by their IPv4 addresses, separated by commas.",
    )
    admission_workers: int = Field(
        1, ge=1, le=64, description="Processes that serve Admission's address side by side on this machine."
    )
    admission_metrics_listen: str | None = Field(
        None,
        description="Address that Admission serves metrics on, to anybody who reaches it; of several workers each takes"
        " the next port. Without it they are not served.",
    )

    @model_validator(mode="after")
    def _only_a_port_is_shared(self) -> Self:
        if self.admission_workers > 1 and self.admission_listen.startswith(UNIX):
            raise ValueError("ORCH_ADMISSION_WORKERS: a socket is served by one process")
        return self
