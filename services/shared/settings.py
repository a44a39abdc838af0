"""What the services' settings have in common: `ORCH_` variables, read once, refused by name.

A field that is not shown (`repr=False`) is a secret; a file may hold it, named by `ORCH_…_FILE`.
"""

import os
import ssl
import sys
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, Field, FilePath, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.shared.keys import is_fernet_key
from services.shared.tls import Certificate, Identity

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


class PlatformSettings(BaseSettings):
    """What all settings have in common."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, hide_input_in_errors=True)


class StorageSettings(PlatformSettings):
    """Where the platform keeps what outlives its processes."""

    database_url: Annotated[str | None, AfterValidator(_connection_string)] = Field(
        None,
        repr=False,
        description="PostgreSQL that holds the registry; without it an embedded one, its data under ORCH_VAR_DIR.",
    )
    var_dir: Path = Field(Path("var"), description="Directory of what outlives the processes.")


class IdentitySettings(PlatformSettings):
    """By what the parts of the platform know each other, where they are not on one machine."""

    tls_cert_file: FilePath | None = Field(
        None,
        description="PEM file of the certificate that other parts of the platform are shown; without it parts speak"
        " no TLS with each other.",
    )
    tls_key_file: FilePath | None = Field(None, description="PEM file of its private key.")
    tls_ca_file: FilePath | None = Field(
        None, description="PEM file of the CA that has signed the certificates of all parts."
    )

    @model_validator(mode="after")
    def _identity_is_whole(self) -> Self:
        files = (self.tls_cert_file, self.tls_key_file, self.tls_ca_file)
        if any(files) and not all(files):
            raise ValueError("ORCH_TLS_CERT_FILE, ORCH_TLS_KEY_FILE, ORCH_TLS_CA_FILE: all of them or none")
        identity = self.identity()
        if identity is not None:
            check_certificate(identity, "ORCH_TLS_CERT_FILE, ORCH_TLS_KEY_FILE")
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(identity.ca)
            except ssl.SSLError as error:
                raise ValueError("ORCH_TLS_CA_FILE: is no certificate in PEM") from error
        return self

    def identity(self) -> Identity | None:
        if self.tls_cert_file is None or self.tls_key_file is None or self.tls_ca_file is None:
            return None
        return Identity(self.tls_cert_file, self.tls_key_file, self.tls_ca_file)


def check_certificate(certificate: Certificate, variables: str) -> None:
    """Raises ValueError, naming the variables, unless the files hold a certificate and its key."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate.certificate, certificate.key)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"{variables}: are no certificate in PEM and its key") from error


class TracingSettings(PlatformSettings):
    """Where traces go."""

    traces_addr: str | None = Field(
        None,
        description="Address of a collector of OpenTelemetry that takes OTLP over gRPC, without TLS, `host:port`."
        " Without it nothing is traced.",
    )


class DrainSettings(PlatformSettings):
    """How a part ends that others can go away from."""

    drain_s: float = Field(
        3,
        ge=0,
        le=300,
        description="How long whoever is told to end serves on after having said so, for callers to go elsewhere, in"
        " seconds; 0 under `september up`, where nobody is left to go to.",
    )


class CommonSettings(StorageSettings, IdentitySettings, TracingSettings, DrainSettings):
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
