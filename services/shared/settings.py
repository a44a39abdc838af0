"""What the services' settings have in common: `ORCH_` variables, read once, refused by name.

A field that is not shown (`repr=False`) is a secret; a file may hold it, named by `ORCH_…_FILE`.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.shared.keys import is_fernet_key

PREFIX = "ORCH_"

S = TypeVar("S", bound=BaseSettings)


def _fernet_keys(value: SecretStr) -> SecretStr:
    if not all(is_fernet_key(key) for key in value.get_secret_value().split(",")):
        raise ValueError("must be one Fernet key, or several separated by commas")
    return value


def _connection_string(value: str | None) -> str | None:
    try:
        conninfo_to_dict(value or "")
    except psycopg.ProgrammingError as error:
        raise ValueError("must be a connection string of PostgreSQL") from error
    return value


class StorageSettings(BaseSettings):
    """Where the platform keeps what outlives its processes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, hide_input_in_errors=True)

    database_url: Annotated[str | None, AfterValidator(_connection_string)] = Field(
        None,
        repr=False,
        description="PostgreSQL that holds the registry; without it an embedded one, its data under ORCH_VAR_DIR.",
    )
    var_dir: Path = Field(Path("var"), description="Directory of what outlives the processes.")


class CommonSettings(StorageSettings):
    """Settings of every service."""

    master_key: Annotated[SecretStr, AfterValidator(_fernet_keys)] = Field(
        repr=False, description="Fernet keys for engine keys, separated by commas: the first encrypts, all decrypt."
    )
    stale_ok_s: float = Field(
        300, ge=1, le=86_400, description="How long Admission may go on admitting without the registry, in seconds."
    )
    boot_timeout_s: float = Field(60, gt=0, le=3600, description="How long an engine may take to become healthy.")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Lowest level that is logged.")

    def master_keys(self) -> list[str]:
        return self.master_key.get_secret_value().split(",")


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{field.upper()}"


def file_variables(settings: type[BaseSettings]) -> dict[str, str]:
    """The variables that name a file, by the secret that it holds."""
    return {name: f"{variable(name)}_FILE" for name, field in settings.model_fields.items() if not field.repr}


def load(settings: type[S]) -> S:
    """Reads settings from the environment, and secrets from the files that it names instead.

    Raises:
        SystemExit: with the name of every variable that is missing or wrong, and no value of any.
    """
    names: dict[str, str] = {}
    secrets: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for field, name in file_variables(settings).items():
        if name in os.environ:
            names[field] = name
            try:
                secrets[field] = _content(os.environ[name], instead_of=variable(field))
            except ValueError as error:
                wrong[field] = str(error)
    try:
        loaded = settings(**secrets)
    except ValidationError as error:
        for e in error.errors():
            wrong.setdefault(str(e["loc"][0]) if e["loc"] else "", e["msg"].removeprefix("Value error, "))
    if wrong:
        sys.exit("\n".join(f"{names.get(f, variable(f))}: {why}" if f else why for f, why in wrong.items()))
    return loaded


def _content(path: str, *, instead_of: str) -> str:
    if instead_of in os.environ:
        raise ValueError(f"{instead_of} is set, too")
    try:
        content = Path(path).read_text(encoding="utf-8").rstrip("\n")
    except OSError as error:
        # Without the path: the secret itself may have been put there.
        raise ValueError(f"can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError("is not text") from error
    if not content:
        raise ValueError("is empty")
    return content
