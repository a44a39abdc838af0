"""Certificates as an installation in production has them."""

import subprocess
from pathlib import Path

from services.cli.gateway import DIRECTORY

EXAMPLE = DIRECTORY / "production"


def make_certificates(directory: Path, *more: str) -> None:
    """A CA and the certificates of all parts; callers know the gateway as `localhost`, and by these names."""
    script = EXAMPLE / "make-certificates"
    subprocess.run([script, directory, "localhost", "127.0.0.1", *more], check=True, capture_output=True)
