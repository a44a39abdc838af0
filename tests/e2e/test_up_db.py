"""`september db migrate`."""

from collections.abc import Callable

import pytest
from cryptography.fernet import Fernet

from tests.e2e.installation import Installation, install
from tests.harness import DEADLINE_S, ROOT

__all__ = ["install"]

Install = Callable[..., Installation]
MIGRATIONS = sorted(path.name for path in (ROOT / "services" / "provisioner" / "sql" / "migrations").iterdir())


def test_migrates_the_embedded_database_and_stops_it_again(install: Install) -> None:
    installation = install()
    assert installation.run("db", "migrate").stdout.splitlines() == MIGRATIONS
    assert installation.run("db", "migrate").stdout == "nothing to apply\n"
    assert installation.processes() == []


def test_does_not_stop_the_database_of_a_running_platform(install: Install) -> None:
    installation = install()
    installation.up()
    assert installation.run("db", "migrate").stdout == "nothing to apply\n"
    assert installation.admit()["status"] == "running"


def test_migrates_the_given_database(install: Install, database_url: str) -> None:
    installation = install(ORCH_DATABASE_URL=database_url)
    assert installation.run("db", "migrate").stdout.splitlines() == MIGRATIONS
    assert not installation.var.exists()


def test_the_master_key_of_an_installation_is_given_up(install: Install) -> None:
    installation = install(ORCH_WARM_POOL_SIZE="0")
    up = installation.up()
    before = installation.admit()
    file = installation.var / "secrets" / "master_key"
    installation.environment["ORCH_MASTER_KEY_FILE"] = str(file)
    looked = installation.run("keys", "status")
    assert (looked.returncode, looked.stdout.splitlines()) == (
        0,
        [
            f"{installation.var}/postgres:",
            "engines.pending_key: 0 under the first master key, 0 under others, 0 unreadable",
            "engines.encrypted_key: 1 under the first master key, 0 under others, 0 unreadable",
            "idempotency_keys.answer: 0 under the first master key, 0 under others, 0 unreadable",
        ],
    )
    up.terminate()
    assert up.wait(DEADLINE_S) == 0

    new = Fernet.generate_key().decode()
    file.write_text(f"{new},{file.read_text()}")
    rotated = installation.run("keys", "rotate")
    assert (rotated.returncode, rotated.stdout.splitlines()[1]) == (0, "1 encrypted anew")
    assert installation.processes() == []
    file.write_text(f"{new}\n")
    installation.up()
    assert installation.admit()["api_key"] == before["api_key"]


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("postgresql://127.0.0.1:1/none", "september: "),
        ("postgresql:///none?host=/nowhere", "september: "),
        ("no url", "ORCH_DATABASE_URL: "),
    ],
)
def test_a_database_that_can_not_be_had_is_one_line_and_exit_code_1(install: Install, url: str, named: str) -> None:
    refused = install(ORCH_DATABASE_URL=url).run("db", "migrate")
    assert refused.returncode == 1
    assert refused.stderr.startswith(named)
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [["db", "migrate", "--fast"], ["db", "shrink"], ["down"], ["up", "now"]])
def test_what_is_no_command_is_exit_code_2(install: Install, command: list[str]) -> None:
    refused = install().run(*command)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
