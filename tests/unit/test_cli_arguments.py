"""Arguments that are refused before anything is called."""

import pytest
from typer.testing import CliRunner

from services.cli.__main__ import app


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["engine", "list", "--limit", "0"], "--limit"),
        (["engine", "list", "--limit", "1001"], "--limit"),
        (["engine", "get"], "USER"),
        (["engine", "destroy", "ada"], "--yes"),
        (["engine", "get", "\udcff"], "utf-8"),
        (["admit", "ada", "--keep-awake-s", "99999999999"], "--keep-awake-s"),
        (["product", "register", "slug"], "--max-engines"),
        (["product", "register", "slug", "--max-engines", "1.5"], "--max-engines"),
        (["product", "policy", "slug", "--rate-limit-rpm", "many"], "--rate-limit-rpm"),
        (["product", "policy", "slug", "--idle-sleep-after-s", "9" * 5000], "--idle-sleep-after-s"),
        (["audit", "--user", "ada", "--product", "demo"], "--product"),
        (["no-such-command"], "no-such-command"),
    ],
    ids=lambda value: "_".join(value)[:50].encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_wrong_arguments_are_named(arguments: list[str], named: str) -> None:
    # Port 1 is nobody's.
    environment = {"ADMISSION_ADDR": "127.0.0.1:1", "PROVISIONER_ADDR": "127.0.0.1:1", "PLATFORM_KEY": "k"}
    refused = CliRunner().invoke(app, arguments, env=environment)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "Error: " in refused.stderr
    assert named in refused.stderr.partition("Error: ")[2]
