"""What an engine is to Docker: its names, its labels, and all that it may do."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from docker import APIClient
from docker.types import LogConfig, Mount, Ulimit

from services.provisioner.backends.base import EngineSpec, Instance, InstanceState

INSTALLATION_LABEL = "september.installation"
_ENGINE_ID_LABEL = "september.engine_id"
_GENERATION_LABEL = "september.generation"

_PORT = 8000
_USER = "10001:10001"
_FILES = 16_384
# Every other state of Docker means that nothing runs.
_STATES = {
    "created": InstanceState.CREATED,
    "running": InstanceState.RUNNING,
    "restarting": InstanceState.RUNNING,
    "paused": InstanceState.FROZEN,
}


def container_name(engine_id: UUID) -> str:
    return f"engine-{engine_id}"


def volume_name(engine_id: UUID) -> str:
    return f"engine-data-{engine_id}"


def copier_name(engine_id: UUID) -> str:
    """Of the container by which the volume is copied."""
    return f"engine-copier-{engine_id}"


def volume_labels(installation: str, engine_id: UUID) -> dict[str, str]:
    return {INSTALLATION_LABEL: installation, _ENGINE_ID_LABEL: str(engine_id)}


@dataclass(frozen=True, slots=True)
class EngineTemplate:
    """Turns specs into options for Docker, and labels back into instances.

    The arguments are those of `DockerBackend`.
    """

    installation: str
    network: str
    catalog_mount: Path | None
    memory_bytes: int
    cpus: float
    pids: int

    def options(self, api: APIClient, spec: EngineSpec) -> Mapping[str, Any]:
        """Arguments for `create_container`: what isn't here no engine gets."""
        name = container_name(spec.engine_id)
        labels = volume_labels(self.installation, spec.engine_id)
        environment = {**spec.environment, "SQLITE_DB_PATH": "/data/brain.sqlite"}
        # The volume is made together with the container, and labelled, if it isn't there.
        mounts = [Mount("/data", volume_name(spec.engine_id), labels=labels)]
        if self.catalog_mount is not None:
            environment["CATALOG_DIR"] = "/catalog"
            mounts.append(Mount("/catalog", str(self.catalog_mount), type="bind", read_only=True))
        return {
            "image": spec.image,
            "name": name,
            "hostname": name,
            "user": _USER,
            "environment": environment,
            "use_config_proxy": False,  # Its address may hold a password.
            "labels": {**labels, _GENERATION_LABEL: str(spec.generation)},
            "healthcheck": {"test": ["NONE"]},
            "ports": [_PORT],
            "networking_config": {"EndpointsConfig": {self.network: api.create_endpoint_config(aliases=[name])}},
            "host_config": api.create_host_config(
                network_mode=self.network,
                port_bindings={_PORT: ("127.0.0.1", spec.port)},
                mounts=mounts,
                cap_drop=["ALL"],
                security_opt=["no-new-privileges:true"],
                read_only=True,
                tmpfs={"/tmp": "size=64m,noexec,nosuid,nodev"},  # noqa: S108
                mem_limit=self.memory_bytes,
                memswap_limit=self.memory_bytes,
                nano_cpus=int(self.cpus * 1e9),
                pids_limit=self.pids,
                # No memory on disk, keys and all. Not of processes: that would count those of all engines.
                ulimits=[Ulimit(name="core", soft=0, hard=0), Ulimit(name="nofile", soft=_FILES, hard=_FILES)],
                log_config=LogConfig(type="local", config={"max-size": "10m", "max-file": "3"}),
                restart_policy={"Name": "no"},
                init=False,
            ),
        }

    def instance(self, labels: Mapping[str, str] | None, status: str) -> Instance | None:
        """The engine that a container with these labels is; None if it isn't ours."""
        if labels is None or labels.get(INSTALLATION_LABEL) != self.installation:
            return None
        try:
            engine_id, generation = UUID(labels[_ENGINE_ID_LABEL]), int(labels[_GENERATION_LABEL])
        except (KeyError, ValueError):
            return None
        return Instance(engine_id, generation, _STATES.get(status, InstanceState.EXITED))
