"""The backend that the settings choose."""

from pathlib import Path
from uuid import UUID

from services.provisioner.backends.base import Backend
from services.provisioner.backends.docker import DockerBackend
from services.provisioner.backends.docker_volumes import DockerVolumes
from services.provisioner.backends.process import ProcessBackend
from services.provisioner.backends.volumes import DirectoryVolumes, Volumes
from services.provisioner.settings import BackendKind, BackendSettings


def backend_of(settings: BackendSettings, installation: UUID, catalog: Path | None = None) -> Backend:
    """What runs the engines of an installation on this host.

    Args:
        catalog: what engines that are made find in their catalog.
    """
    if settings.engine_backend is BackendKind.DOCKER:
        return DockerBackend(str(installation), settings.engine_network, catalog)
    return ProcessBackend(str(installation), settings.var_dir / "engines", catalog)


def volumes_of(settings: BackendSettings, installation: UUID) -> Volumes:
    """The data of those engines."""
    if settings.engine_backend is BackendKind.DOCKER:
        return DockerVolumes(str(installation))
    return DirectoryVolumes(settings.var_dir / "engines")
