"""What the Provisioner is told by its environment."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import NoDecode

from services.shared.settings import CommonSettings, StorageSettings


class BackendKind(StrEnum):
    DOCKER = "docker"
    PROCESS = "process"


class UrlMode(StrEnum):
    NETWORK = "network"
    HOST = "host"


def _alias(value: Any) -> Any:
    return BackendKind.PROCESS if value == "subprocess" else value


def _split(value: Any) -> Any:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


class BackendSettings(StorageSettings):
    """What it takes to get to the engines of this host."""

    node: str = Field(
        "local", min_length=1, description="Name of the host whose backend this is; the same for all who share it."
    )
    engine_backend: Annotated[BackendKind, BeforeValidator(_alias)] = Field(
        BackendKind.DOCKER, description="What runs engines: `docker`, or `process` (alias `subprocess`)."
    )
    engine_network: str = Field("engine_net", min_length=1, description="Docker network of engines.")


class ProvisionerSettings(BackendSettings, CommonSettings):
    """Settings of the Provisioner."""

    admin_key: SecretStr = Field(min_length=16, repr=False, description="Key of operators, at least 16 characters.")
    provisioner_listen: str = Field(
        "127.0.0.1:50052",
        description="Address that the Provisioner serves gRPC on: `host:port` or `unix:/path`.",
    )
    provisioner_metrics_listen: str | None = Field(
        None,
        description="Address that the Provisioner serves metrics on, to anybody who reaches it. Without it they are"
        " not served.",
    )
    engine_image: str = Field(
        "", description="What engines run: an image of Docker, or a Python module for the process backend."
    )
    engine_env_passthrough: Annotated[list[str], NoDecode, BeforeValidator(_split)] = Field(
        [], description="Names of variables that engines get from the Provisioner's own environment, by commas."
    )
    engine_url_mode: UrlMode = Field(
        UrlMode.HOST,
        description="Whether engine URLs are for products on this `host`, or for those in the engines' `network`.",
    )
    catalog_mount_path: Path | None = Field(
        None, description="Directory that every engine finds read-only at /catalog."
    )
    port_min: int = Field(9001, ge=1024, le=65535, description="Lowest port that an engine may get.")
    port_max: int = Field(9999, ge=1024, le=65535, description="Highest port that an engine may get.")
    disk_free_min_mib: int = Field(
        1024,
        ge=0,
        description="Room, in MiB, that has to be left for engines' data where the Provisioner sees it (its log says"
        " `disk_not_seen` if not): below that no new engine is begun.",
    )
    boot_concurrency: int = Field(8, ge=1, le=256, description="Most engines that one Provisioner boots at once.")
    warm_pool_size: int = Field(
        0,
        ge=0,
        le=256,
        description="Engines of the platform's own image that are kept booted ahead, for users yet to come;"
        " 2 if `september up` is told nothing.",
    )
    health_check_timeout_s: float = Field(
        10, gt=0, le=300, description="How long an engine may take to answer a probe."
    )
    health_check_interval_s: float = Field(
        30, ge=1, le=3600, description="Seconds between two probes of a running engine."
    )
    health_max_failures: int = Field(
        3, ge=1, le=100, description="Failed probes in a row after which an engine is failed."
    )
    restart_backoff_base_s: float = Field(5, ge=0.1, le=3600, description="Pause before the first automatic restart.")
    restart_backoff_max_s: float = Field(300, ge=0.1, le=86400, description="Longest pause between automatic restarts.")
    restart_max_attempts: int = Field(
        8, ge=1, le=100, description="Automatic restarts after which an engine is given up."
    )
    reconcile_interval_s: float = Field(
        60, ge=1, le=3600, description="Seconds between two comparisons of the registry with what exists."
    )
    sleep_check_interval_s: float = Field(5, ge=0.1, le=3600, description="Seconds between two looks for idle engines.")
    deep_sleep_after_s: float = Field(
        3600, ge=1, le=31_536_000, description="Seconds of sleep after which an engine is stopped to free its memory."
    )
    audit_retention_days: int = Field(
        400,
        ge=1,
        le=36_500,
        description="How long audit events and ended operations are kept; a month of events is dropped at once.",
    )
    operation_lease_s: float = Field(
        5, ge=1, le=300, description="Time after which another Provisioner takes over the work of one that died."
    )
    stop_engines_on_exit: bool = Field(
        False, description="Stop this node's engines when the Provisioner ends, and start them again with it."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.port_max < self.port_min:
            raise ValueError("ORCH_PORT_MAX must not be below ORCH_PORT_MIN")
        return self

    @property
    def image(self) -> str:
        """The platform's own image."""
        default = "september-engine:dev" if self.engine_backend is BackendKind.DOCKER else "services.engine"
        return self.engine_image or default
