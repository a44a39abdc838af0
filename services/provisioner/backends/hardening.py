"""Whether a container is as closed as an engine's has to be."""

from collections.abc import Mapping
from typing import Any

# What an engine is never given, and so stays empty.
_EMPTY = (
    "Binds",
    "CapAdd",
    "DeviceCgroupRules",
    "DeviceRequests",
    "Devices",
    "GroupAdd",
    "Links",
    "OomKillDisable",
    "PidMode",
    "Privileged",
    "PublishAllPorts",
    "Sysctls",
    "UTSMode",
    "UsernsMode",
    "VolumesFrom",
)


def deviations(container: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """Names of what differs between a container and what its engine would be given now; none if it may be started.

    A version before, or somebody by hand, may have made it. Seccomp and AppArmor are Docker's defaults,
    which only a security option takes away, and those are compared.

    Args:
        container: as Docker shows it.
        options: for the making of it, of `EngineTemplate.options`.
    """
    host = container["HostConfig"]
    intended = dict(options["host_config"])
    # A daemon adds its own defaults to those.
    limits = {limit["Name"]: limit for limit in host["Ulimits"] or []}
    differing = [f"Ulimits.{one['Name']}" for one in intended.pop("Ulimits") if not _has(limits.get(one["Name"]), one)]
    differing += [name for name, value in intended.items() if not _has(host.get(name), value)]
    differing += [name for name in _EMPTY if host.get(name)]
    if container["Config"]["User"] != options["user"]:
        differing.append("User")
    if host["IpcMode"] not in ("", "private"):
        differing.append("IpcMode")
    if host["MaskedPaths"] == [] or host["ReadonlyPaths"] == []:
        differing.append("MaskedPaths")
    if container["AppArmorProfile"] == "unconfined":
        differing.append("AppArmorProfile")
    if container["NetworkSettings"]["Networks"].keys() != options["networking_config"]["EndpointsConfig"].keys():
        differing.append("Networks")
    return sorted(differing)


def _has(found: object, intended: object) -> bool:
    """Whether what is intended is there, and in lists nothing else; Docker adds fields, and leaves out empty ones."""
    if isinstance(intended, Mapping) and isinstance(found, Mapping):
        return all(_has(found.get(name), value) for name, value in intended.items())
    if isinstance(intended, list) and isinstance(found, list):
        return len(found) == len(intended) and all(map(_has, found, intended))
    return found == intended or not (found or intended)
