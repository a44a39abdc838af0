"""Copies of the volumes of the local Docker daemon."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

from docker import APIClient
from docker.errors import APIError, NotFound
from docker.types import Mount

from services.provisioner.backends.docker_client import connected
from services.provisioner.backends.docker_errors import translated
from services.provisioner.backends.engine_template import INSTALLATION_LABEL, copier_name, volume_labels, volume_name
from services.shared.errors import BackendError, Unavailable

_REPOSITORY = "september-volume-copy"


class DockerVolumes:
    """By containers that have the volume, and are never started; their image is empty.

    Args:
        installation: label of what is ours.
        timeout_s: seconds that the daemon may be silent.
    """

    def __init__(self, installation: str, *, timeout_s: float = 60.0) -> None:
        self._installation = installation
        self._tag = uuid4().hex  # Another copy that ends takes only its own image away.
        self._timeout_s = timeout_s
        self._client: APIClient | None = None

    def open(self) -> None:
        with translated():
            self._client = connected(self._timeout_s)
            nothing = io.BytesIO()
            tarfile.open(fileobj=nothing, mode="w").close()
            self._client.import_image_from_data(nothing.getvalue(), repository=_REPOSITORY, tag=self._tag)

    def close(self) -> None:
        if self._client is not None:
            with suppress(APIError):
                self._client.remove_image(f"{_REPOSITORY}:{self._tag}")
            self._client.close()

    def save(self, engine_id: UUID, archive: Path) -> bool:
        with translated():
            if self._labels(volume_name(engine_id)) is None:
                return False
            with self._mounted(engine_id) as container, archive.open("wb") as file:
                content, _ = self._api.get_archive(container, "/data")
                for chunk in content:
                    file.write(chunk)
        return True

    def restore(self, engine_id: UUID, archive: Path) -> bool:
        # Volumes can't be renamed: another one is there for as long as this one is not whole.
        incomplete = f"{volume_name(engine_id)}.incomplete"
        labels = volume_labels(self._installation, engine_id)
        with translated():
            if self._labels(volume_name(engine_id)) is not None:
                if self._labels(incomplete) is None:
                    return False
                self._remove_copier(engine_id)
                self._api.remove_volume(volume_name(engine_id))
            self._api.create_volume(incomplete, labels=labels)
            self._api.create_volume(volume_name(engine_id), labels=labels)
            with self._mounted(engine_id) as container, archive.open("rb") as file:
                if not self._api.put_archive(container, "/", file):
                    raise BackendError("the container service refused the engine's volume")
            self._api.remove_volume(incomplete)
        return True

    @property
    def _api(self) -> APIClient:
        if self._client is None:
            raise Unavailable("the container service can't be reached")
        return self._client

    def _labels(self, volume: str) -> dict[str, str] | None:
        """Labels of the volume; None if there is no such volume.

        Raises:
            BackendError: it is another installation's.
        """
        try:
            labels: dict[str, str] = self._api.inspect_volume(volume)["Labels"] or {}
        except NotFound:
            return None
        if labels.get(INSTALLATION_LABEL) != self._installation:
            raise BackendError("the engine's volume belongs to another installation")
        return labels

    @contextmanager
    def _mounted(self, engine_id: UUID) -> Iterator[str]:
        """The id of a container that has the engine's volume at `/data`."""
        self._remove_copier(engine_id)
        container = self._api.create_container(
            f"{_REPOSITORY}:{self._tag}",
            ["/never-started"],
            name=copier_name(engine_id),
            network_disabled=True,
            labels={INSTALLATION_LABEL: self._installation},
            host_config=self._api.create_host_config(mounts=[Mount("/data", volume_name(engine_id))]),
        )["Id"]
        try:
            yield container
        finally:
            self._remove_copier(engine_id)

    def _remove_copier(self, engine_id: UUID) -> None:
        """One that a copy which died has left would keep the volume from being removed."""
        with suppress(NotFound):
            self._api.remove_container(copier_name(engine_id), force=True)
