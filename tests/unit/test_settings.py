"""Settings: wrong values are refused at the start, by the variable's name and without the value."""

from pathlib import Path

import pytest

from services.admission.settings import AdmissionSettings
from services.cli.settings import EdgeSettings
from services.provisioner.settings import BackendKind, ProvisionerSettings
from services.shared.settings import IdentitySettings, StorageSettings, file_variables, load

GOOD = {"ORCH_MASTER_KEY": "A" * 43 + "=", "ORCH_ADMIN_KEY": "a" * 16}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ORCH_MASTER_KEY", "secret-but-wrong"),
        ("ORCH_MASTER_KEY", GOOD["ORCH_MASTER_KEY"] + ","),
        ("ORCH_ADMIN_KEY", "short-secret"),
        ("ORCH_DATABASE_URL", "hello secret"),
        ("ORCH_PORT_MIN", "80"),
        ("ORCH_PORT_MAX", "65536"),
        ("ORCH_PORT_MAX", "9000"),
        ("ORCH_ENGINE_BACKEND", "kubernetes"),
        ("ORCH_ENGINE_URL_MODE", "public"),
        ("ORCH_BOOT_TIMEOUT_S", "0"),
        ("ORCH_BOOT_TIMEOUT_S", "soon"),
        ("ORCH_BOOT_CONCURRENCY", "0"),
        ("ORCH_AUDIT_RETENTION_DAYS", "0"),
        ("ORCH_LOG_LEVEL", "LOUD"),
    ],
)
def test_a_wrong_value_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as refused:
        load(ProvisionerSettings)
    message = str(refused.value.code)
    assert name in message
    assert "secret" not in message


def test_missing_secrets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GOOD:
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as refused:
        load(ProvisionerSettings)
    assert all(name in str(refused.value.code) for name in GOOD)


def test_admission_does_without_the_admin_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCH_ADMIN_KEY")
    assert load(AdmissionSettings).master_keys() == [GOOD["ORCH_MASTER_KEY"]]


def test_every_secret_may_be_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = "postgresql://september:pass@host/registry"
    for name, value in (*GOOD.items(), ("ORCH_DATABASE_URL", url)):
        monkeypatch.delenv(name, raising=False)
        (tmp_path / name).write_text(f"{value}\n")
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / name))
    settings = load(ProvisionerSettings)
    assert settings.master_keys() == [GOOD["ORCH_MASTER_KEY"]]
    assert settings.admin_key.get_secret_value() == GOOD["ORCH_ADMIN_KEY"]
    assert settings.database_url == url
    assert {f"{name}_FILE" for name in (*GOOD, "ORCH_DATABASE_URL")} == {*file_variables(ProvisionerSettings).values()}


@pytest.mark.parametrize("name", [*GOOD, "ORCH_DATABASE_URL"])
@pytest.mark.parametrize("content", [None, b"", b"\n", b"secret", b"\xff\xfe", "directory"])
def test_a_wrong_file_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes | str | None
) -> None:
    path = tmp_path / "secret"
    if content == "directory":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(f"{name}_FILE", str(path))
    with pytest.raises(SystemExit) as refused:
        load(ProvisionerSettings)
    (line,) = str(refused.value.code).splitlines()
    assert line.startswith(f"{name}_FILE: ")
    assert "secret" not in line


@pytest.mark.parametrize("name", GOOD)
def test_a_secret_and_its_file_at_once_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text(GOOD[name])
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "file"))
    with pytest.raises(SystemExit) as refused:
        load(ProvisionerSettings)
    assert str(refused.value.code) == f"{name}_FILE: {name} is set, too"


def test_a_secret_in_place_of_its_files_name_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_DATABASE_URL_FILE", "postgresql://september:pass@host/registry")
    with pytest.raises(SystemExit) as refused:
        load(StorageSettings)
    assert "pass" not in str(refused.value.code)


def test_names_that_operators_know_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_ENGINE_BACKEND", "subprocess")
    monkeypatch.setenv("ORCH_ENGINE_ENV_PASSTHROUGH", "A, B,,")
    settings = load(ProvisionerSettings)
    assert settings.engine_backend is BackendKind.PROCESS
    assert settings.engine_env_passthrough == ["A", "B"]
    assert settings.image == "services.engine"


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_DATABASE_URL", "postgresql://september:pass@host/registry")
    shown = repr(load(ProvisionerSettings))
    assert not any(value in shown for value in (*GOOD.values(), ":pass@"))


FILES = ("ORCH_TLS_CERT_FILE", "ORCH_TLS_KEY_FILE", "ORCH_TLS_CA_FILE")


@pytest.mark.parametrize("given", [FILES[:1], FILES[:2], FILES[1:], FILES])
def test_an_identity_is_whole_and_of_certificates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("no certificate")
    for name in given:
        monkeypatch.setenv(name, str(tmp_path / "file"))
    why = "are no certificate in PEM" if given == FILES else "all of them or none"
    with pytest.raises(SystemExit, match=rf"^ORCH_TLS_CERT_FILE, ORCH_TLS_KEY_FILE.*: {why}"):
        load(IdentitySettings)


def test_a_file_of_a_certificate_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORCH_GATEWAY_CERT_FILE", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match=r"^ORCH_GATEWAY_CERT_FILE: "):
        load(EdgeSettings)
    monkeypatch.delenv("ORCH_GATEWAY_CERT_FILE")
    (tmp_path / "key").touch()
    monkeypatch.setenv("ORCH_GATEWAY_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(SystemExit, match=r"^ORCH_GATEWAY_CERT_FILE, ORCH_GATEWAY_KEY_FILE: both or none$"):
        load(EdgeSettings)


def test_a_socket_has_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_ADMISSION_LISTEN", "unix:/run/admission")
    monkeypatch.setenv("ORCH_ADMISSION_WORKERS", "2")
    with pytest.raises(SystemExit, match=r"^ORCH_ADMISSION_WORKERS: "):
        load(AdmissionSettings)
