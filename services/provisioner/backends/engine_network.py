"""The network of all engines, on which none reaches another."""

import os
import shutil
import subprocess
import time
from hashlib import sha256
from typing import Any

import structlog
from docker import APIClient
from docker.errors import APIError, NotFound

from services.provisioner.backends.docker_errors import is_conflict
from services.provisioner.backends.engine_template import INSTALLATION_LABEL

log = structlog.get_logger(__name__)

_PAUSE_S = 0.1
_BRIDGE = "com.docker.network.bridge.name"
_BETWEEN_CONTAINERS = "com.docker.network.bridge.enable_icc"


class EngineNetwork:
    """A bridge that forwards nothing from one container to another.

    What else engines must not reach, this host's own ports and private networks, is the packet
    filter's to refuse, which takes a right that the Provisioner need not have:
    `deploy/docker/isolate-engines` tells it. Here is only seen whether that was done.

    Args:
        name: of the network.
        installation: label of what is ours.
        timeout_s: how long to try, in seconds.
    """

    def __init__(self, name: str, installation: str, timeout_s: float) -> None:
        self._name = name
        self._installation = installation
        self._timeout_s = timeout_s

    def open(self, api: APIClient) -> None:
        """Makes the network if it isn't there, and warns of what is open on it.

        One of an earlier version is made anew if nobody is on it; one that is in use, or that others
        have made, is used as it is.
        """
        network = self._made(api)
        if _faults(network) and self._is_unused(network):
            try:
                api.remove_network(network["Id"])
            except APIError as exc:
                if not is_conflict(exc) and exc.status_code != 404:  # Somebody has just come, or was first.
                    raise
            network = self._made(api)
        for fault in [*_faults(network), *_unguarded(network)]:
            log.warning("engine_network_open", network=self._name, fault=fault)

    def _made(self, api: APIClient) -> dict[str, Any]:
        """Docker lets two of one name be made at once, and then serves neither; the bridge's name is unique."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                found: dict[str, Any] = api.inspect_network(self._name)
            except NotFound:
                pass
            else:
                return found
            try:
                api.create_network(
                    self._name,
                    driver="bridge",
                    options={_BRIDGE: _own_bridge(self._name), _BETWEEN_CONTAINERS: "false"},
                    labels={INSTALLATION_LABEL: self._installation},
                )
            except APIError as exc:
                if not is_conflict(exc) or time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_S)

    def _is_unused(self, network: dict[str, Any]) -> bool:
        return network["Labels"].get(INSTALLATION_LABEL) == self._installation and not network["Containers"]


def _own_bridge(network: str) -> str:
    """The bridge's name as deploy/docker/isolate-engines knows it, too, before there is a network."""
    return f"br-{sha256(network.encode()).hexdigest()[:12]}"


def _faults(network: dict[str, Any]) -> list[str]:
    faults = []
    if network["Driver"] != "bridge" or network["Options"].get(_BETWEEN_CONTAINERS) != "false":
        faults.append(f"engines may reach each other: make it with {_BETWEEN_CONTAINERS}=false")
    if network["EnableIPv6"]:
        faults.append("it has IPv6, for which isolate-engines makes no rules")
    return faults


def _unguarded(network: dict[str, Any]) -> list[str]:
    bridge = network["Options"].get(_BRIDGE, f"br-{network['Id'][:12]}")
    iptables = shutil.which("iptables")
    if os.geteuid() != 0 or iptables is None:
        return ["not seen whether engines reach this host: run deploy/docker/isolate-engines"]
    rule = ["INPUT", "--in-interface", bridge, "--jump", f"ENGINES-{bridge}-IN"]
    if subprocess.run([iptables, "--wait", "5", "--check", *rule], capture_output=True, timeout=10).returncode == 0:
        return []
    return ["engines reach this host and private networks: run deploy/docker/isolate-engines"]
