"""What Admission is told by its environment."""

from pydantic import Field

from services.shared.settings import CommonSettings


class AdmissionSettings(CommonSettings):
    """Settings of Admission."""

    admission_listen: str = Field("127.0.0.1:50051", description="Address that Admission serves gRPC on.")
    provisioner_addr: str = Field("127.0.0.1:50052", description="Address of the Provisioner.")
    admission_workers: int = Field(
        1, ge=1, le=64, description="Processes that serve Admission's address side by side on this machine."
    )
