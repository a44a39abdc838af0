"""A backup that is not whole is no backup."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from services.provisioner.backup_manifest import Manifest, Refused, begin, contents_of, registry_file, verified, write


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    directory = tmp_path / "backup"
    begin(directory)
    registry_file(directory).write_text("SELECT 1;")
    (directory / f"{uuid4()}.tar").write_bytes(b"data")
    write(
        directory,
        Manifest(
            made_at=datetime.now(UTC), installation_id=uuid4(), backend="docker",
            migrations=["0001_registry.sql"], products=1, engines=[], omitted=[], images=[],
            files=contents_of(directory),
        ),
    )  # fmt: skip
    return directory


def test_what_was_written_is_verified(backup: Path) -> None:
    assert len(verified(backup).files) == 2


def _change(backup: Path) -> None:
    registry_file(backup).write_text("SELECT 2;")


def _lose(backup: Path) -> None:
    next(backup.glob("*.tar")).unlink()


def _add(backup: Path) -> None:
    (backup / "more").touch()


def _without_manifest(backup: Path) -> None:
    (backup / "manifest.json").unlink()


def _later_format(backup: Path) -> None:
    manifest = json.loads((backup / "manifest.json").read_text())
    (backup / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))


@pytest.mark.parametrize("spoil", [_change, _lose, _add, _without_manifest, _later_format])
def test_what_is_not_as_it_was_is_refused(backup: Path, spoil: Callable[[Path], None]) -> None:
    spoil(backup)
    with pytest.raises(Refused):
        verified(backup)


def test_a_backup_takes_an_empty_directory(backup: Path) -> None:
    with pytest.raises(Refused):
        begin(backup)
