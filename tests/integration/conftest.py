"""Fixtures of the integration tests."""

from collections.abc import AsyncIterator

import pytest

from services.provisioner.store.migrations import migrate
from services.shared.postgres import Database
from tests.integration.backend_rigs import docker_rig, process_rig, rig
from tests.integration.docker_daemon import busybox_images, docker_api

__all__ = ["busybox_images", "docker_api", "docker_rig", "process_rig", "rig"]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A registry without any row, for stores that a test calls itself."""
    await migrate(database_url)
    database = Database(database_url, application_name="test", max_size=20)
    await database.open()
    yield database
    await database.close()
