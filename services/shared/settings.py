"""What the services' settings have in common: `ORCH_` variables, read once, refused by name."""

import sys
from pathlib import Path
from typing import Annotated, TypeVar

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
        None, description="PostgreSQL that holds the registry; without it an embedded one, its data under ORCH_VAR_DIR."
    )
    var_dir: Path = Field(Path("var"), description="Directory of what outlives the processes.")


class CommonSettings(StorageSettings):
    """Settings of every service."""

    master_key: Annotated[SecretStr, AfterValidator(_fernet_keys)] = Field(
        description="Fernet keys for engine keys, separated by commas: the first encrypts, all decrypt."
    )
    stale_ok_s: float = Field(
        300, ge=1, le=86_400, description="How long Admission may go on admitting without the registry, in seconds."
    )
    boot_timeout_s: float = Field(60, gt=0, le=3600, description="How long an engine may take to become healthy.")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Lowest level that is logged.")

    def master_keys(self) -> list[str]:
        return self.master_key.get_secret_value().split(",")


def load(settings: type[S]) -> S:
    """Reads settings from the environment.

    Raises:
        SystemExit: with the name of every variable that is missing or wrong, and no value of any.
    """
    try:
        return settings()
    except ValidationError as error:
        sys.exit("\n".join(_line(str(e["loc"][0]) if e["loc"] else "", e["msg"]) for e in error.errors()))


def _line(field: str, message: str) -> str:
    message = message.removeprefix("Value error, ")
    return f"{PREFIX}{field.upper()}: {message}" if field else message
