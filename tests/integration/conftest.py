"""Fixtures of the integration tests."""

from tests.integration.backend_rigs import docker_rig, process_rig, rig
from tests.integration.docker_daemon import busybox_images, docker_api

__all__ = ["busybox_images", "docker_api", "docker_rig", "process_rig", "rig"]
