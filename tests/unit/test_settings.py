"""Settings: wrong values are refused at the start, by the variable's name and without the value."""

import pytest

from services.admission.settings import AdmissionSettings
from services.provisioner.settings import BackendKind, ProvisionerSettings
from services.shared.settings import load

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


def test_names_that_operators_know_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_ENGINE_BACKEND", "subprocess")
    monkeypatch.setenv("ORCH_ENGINE_ENV_PASSTHROUGH", "A, B,,")
    settings = load(ProvisionerSettings)
    assert settings.engine_backend is BackendKind.PROCESS
    assert settings.engine_env_passthrough == ["A", "B"]
    assert settings.image == "services.engine"


def test_no_secret_is_shown() -> None:
    shown = repr(load(ProvisionerSettings))
    assert not any(value in shown for value in GOOD.values())
