"""What a product may do, and how a policy is read from untyped JSON."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from services.shared.errors import InvalidRequest, PolicyDenied

MAX_ENGINES = 1_000_000
MAX_RATE_LIMIT_RPM = 1_000_000
MAX_IDLE_SLEEP_AFTER_S = 31_536_000
MAX_KEEP_AWAKE_S = 604_800
DEFAULT_KEEP_AWAKE_S = 3600
MAX_GLOBS = 100
# Names, tags and digests of images as Docker takes them, and dotted names of modules.
_IMAGE = re.compile(r"[a-z0-9][a-zA-Z0-9._/:@-]{0,254}")
GLOB = re.compile(r"[a-zA-Z0-9._/:@*?\[\]!-]{1,255}")


@dataclass(frozen=True, slots=True)
class Policy:
    """A product's policy.

    Args:
        max_engines: most engines in all states together.
        rate_limit_rpm: most admits in any 60 seconds; None for no limit.
        allowed_images: globs of images; none means the repository of the platform's own image.
        idle_sleep_after_s: seconds without a sign of work until an engine is put to sleep; None for never.
        max_keep_awake_s: most seconds for which an admit may keep an engine awake.
    """

    max_engines: int
    rate_limit_rpm: int | None
    allowed_images: tuple[str, ...]
    idle_sleep_after_s: int | None = None
    max_keep_awake_s: int = DEFAULT_KEEP_AWAKE_S


def parse_policy(fields: Mapping[str, object]) -> Policy:
    """Reads a policy, refusing what it does not know: a misspelt limit would be no limit.

    Args:
        fields: decoded JSON, in which every number is a float.

    Raises:
        InvalidRequest: naming the field.
    """
    known = {field.name for field in dataclasses.fields(Policy)}
    for name in fields:
        if name not in known:
            raise InvalidRequest(f"policy.{name[:64]}: unknown field; the fields are {', '.join(sorted(known))}")
    if "max_engines" not in fields:
        raise InvalidRequest("policy.max_engines: required")
    return Policy(
        max_engines=_whole_number("max_engines", fields["max_engines"], 0, MAX_ENGINES),
        rate_limit_rpm=_optional_number("rate_limit_rpm", fields.get("rate_limit_rpm"), 1, MAX_RATE_LIMIT_RPM),
        allowed_images=_globs("allowed_images", fields.get("allowed_images", [])),
        idle_sleep_after_s=_optional_number(
            "idle_sleep_after_s", fields.get("idle_sleep_after_s"), 1, MAX_IDLE_SLEEP_AFTER_S
        ),
        max_keep_awake_s=_whole_number(
            "max_keep_awake_s", fields.get("max_keep_awake_s", DEFAULT_KEEP_AWAKE_S), 0, MAX_KEEP_AWAKE_S
        ),
    )


def _optional_number(name: str, value: object, low: int, high: int) -> int | None:
    return None if value is None else _whole_number(name, value, low, high)


def _whole_number(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value % 1:
        raise InvalidRequest(f"policy.{name}: must be a whole number from {low} to {high}")
    return int(value)


def _globs(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_GLOBS:
        raise InvalidRequest(f"policy.{name}: must be a list of at most {MAX_GLOBS} globs")
    for index, glob in enumerate(value):
        if not isinstance(glob, str) or not GLOB.fullmatch(glob):
            raise InvalidRequest(f"policy.{name}[{index}]: must be a glob of image names, 1 to 255 characters")
    return tuple(value)


def check_image(image: str, policy: Policy, platform_image: str) -> None:
    """Refuses an image that the policy does not allow.

    Raises:
        InvalidRequest: it is not the name of an image at all.
        PolicyDenied: it is outside the allow-list.
    """
    if not _IMAGE.fullmatch(image):
        raise InvalidRequest("engine_version: must be the name of an image")
    repository = image_repository(platform_image)
    globs = policy.allowed_images or (repository, f"{repository}:*", f"{repository}@*")
    if not any(fnmatchcase(image, glob) for glob in globs):
        raise PolicyDenied("engine_version: the product's policy does not allow this image")


def image_repository(image: str) -> str:
    """The image's name without tag and digest; a port in the registry's name is not a tag."""
    name = image.partition("@")[0]
    head, colon, tail = name.rpartition(":")
    return head if colon and "/" not in tail else name
