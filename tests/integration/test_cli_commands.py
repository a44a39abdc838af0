"""`september` as operators and scripts run it: its output in each form, and its exit codes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from services.cli.var_directory import VarDirectory
from services.provisioner.domain.audit import AuditAction
from services.shared.keys import new_platform_key
from tests.harness import DEADLINE_S, ROOT, Platform, Service, eventually

pytestmark = pytest.mark.early(20)

Shared = tuple[Platform, list[Service]]
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"
COMMAND = [sys.executable, "-m", "services.cli"]


class Result:
    """How a command ended, and what it said."""

    def __init__(self, code: int, out: str, err: str = "") -> None:
        assert "Traceback" not in out + err, out + err
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"

    @property
    def rows(self) -> list[list[str]]:
        return [line.split("\t") for line in self.out.splitlines()]

    @property
    def record(self) -> dict[str, str]:
        return dict(self.rows)


class September:
    """Runs commands in an environment."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def with_(self, **changed: str) -> "September":
        return September({**self.environment, **changed})

    def __call__(self, *arguments: str) -> Result:
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE_S,
            check=False,
        )  # fmt: skip
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    def json(self, *arguments: str, code: int = 0) -> Any:
        """The one document that is printed with --json: on standard output, or for an error on the other."""
        done = self(*arguments, "--json")
        assert done.code == code, done
        assert not (done.out and done.err), done
        return json.loads(done.out or done.err)

    def refused(self, *arguments: str) -> tuple[int, str]:
        """Exit code and error code of a call that the platform refuses, in one line."""
        done = self(*arguments)
        code, colon, _ = done.err.partition(": ")
        assert (colon, done.err.count("\n"), done.out) == (": ", 1, ""), done
        return done.code, code

    @contextmanager
    def running(self, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
        """A command that does not end by itself, or not soon.

        It hears Ctrl-C though the tests themselves may run in the background, where that is ignored.
        """
        with subprocess.Popen(
            ["env", "--default-signal=INT", *COMMAND, *arguments],
            cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()

    def on_a_terminal(self, *arguments: str, answer: str = "") -> Result:
        """Runs it on a terminal, where its question gets an answer."""
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, [*COMMAND, *arguments], {**self.environment, "COLUMNS": "160", "TERM": "xterm"})
        shown = b""
        # Once nobody has the terminal open any more, it can't be read.
        with suppress(OSError), open(terminal, "r+b", buffering=0) as stream:
            while part := stream.read(4096):
                shown += part
                if answer and b"[y/N]: " in shown:
                    stream.write(answer.encode())
                    answer = ""
        return Result(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode().replace("\r\n", "\n"))


@pytest.fixture(scope="module")
def operator(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> September:
    """Knows the shared installation and its admin key, from the environment."""
    platform, (provisioner, admission, _) = shared
    return September(
        {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}:{ROOT / 'gen' / 'python'}",
            "ORCH_VAR_DIR": str(tmp_path_factory.mktemp("nothing")),
            "ADMISSION_ADDR": admission.address,
            "PROVISIONER_ADDR": provisioner.address,
            "ADMIN_KEY": platform.admin_key,
        }
    )


def new_slug() -> str:
    return f"p{uuid4().hex[:20]}"


def register(operator: September, *policy: str) -> September:
    """Whoever holds the key of a new product, and no other."""
    registered = operator.json("product", "register", new_slug(), *(policy or ("--max-engines", "10")))
    environment = {name: value for name, value in operator.environment.items() if name != "ADMIN_KEY"}
    return September({**environment, "PLATFORM_KEY": registered["platform_api_key"]})


@pytest.fixture(scope="module")
def product(operator: September) -> September:
    return register(operator)


def test_the_life_of_a_product(operator: September) -> None:
    slug = new_slug()
    registered = operator("product", "register", slug, "--max-engines", "3", "--rate-limit-rpm", "600").record
    assert list(registered) == ["product_id", "slug", "platform_api_key"]
    product_id, key = registered["product_id"], registered["platform_api_key"]
    product = operator.with_(PLATFORM_KEY=key)
    assert operator.refused("product", "register", slug, "--max-engines", "3") == (5, "PRODUCT_SLUG_EXISTS")

    listed = {row[0]: row for row in operator("product", "list").rows}
    assert listed[slug][1:4] == [product_id, "3", "600"]
    assert slug in [p["slug"] for p in operator.json("product", "list")["products"]]

    shown = operator.json("product", "get", slug)["product"]
    assert re.fullmatch(TIME, shown.pop("created_at"))
    assert shown == {
        "product_id": product_id,
        "slug": slug,
        "policy": {"max_engines": 3, "rate_limit_rpm": 600, "allowed_images": [], "max_keep_awake_s": 3600},
    }
    assert operator("product", "get", product_id).record["slug"] == slug

    assert operator("product", "disable", slug).record["disabled_at"]
    eventually(lambda: product("admit", "ada").code == 8, "the keys are refused")
    assert operator("product", "enable", slug).record["disabled_at"] == ""
    eventually(lambda: product("admit", "ada").code == 3, "the keys are taken again")

    rotated = operator("product", "rotate-key", slug).record
    assert list(rotated) == ["platform_api_key"]
    eventually(lambda: product("admit", "ada").code == 8, "the old key is refused")
    assert operator.with_(PLATFORM_KEY=rotated["platform_api_key"])("admit", "ada").code == 3
    both = operator.json("product", "rotate-key", product_id, "--grace-s", "600")
    for taken in (rotated["platform_api_key"], both["platform_api_key"]):
        assert operator.with_(PLATFORM_KEY=taken)("admit", "ada").code == 3


def test_a_policy_changes_only_in_what_is_named(operator: September) -> None:
    slug = operator("product", "register", new_slug(), "--max-engines", "3").record["slug"]

    def policy(*options: str) -> Any:
        return operator.json("product", "policy", slug, *options)["policy"]

    expected: dict[str, Any] = {"max_engines": 3, "allowed_images": [], "max_keep_awake_s": 3600}
    assert policy() == expected
    expected |= {"rate_limit_rpm": 60, "idle_sleep_after_s": 900}
    assert policy("--rate-limit-rpm", "60", "--idle-sleep-after-s", "900") == expected
    expected |= {"allowed_images": ["one:*", "two"], "max_engines": 0}
    assert policy("--allow-image", "one:*", "--allow-image", "two", "--max-engines", "0") == expected
    del expected["rate_limit_rpm"]
    expected |= {"max_keep_awake_s": 0}
    assert policy("--rate-limit-rpm", "none", "--max-keep-awake-s", "0") == expected
    del expected["idle_sleep_after_s"]
    expected |= {"allowed_images": []}
    assert policy("--idle-sleep-after-s", "none", "--allow-image", "none") == expected
    assert policy() == expected
    assert operator("product", "policy", slug).record == {
        "max_engines": "0", "rate_limit_rpm": "", "allowed_images": "", "idle_sleep_after_s": "",
        "max_keep_awake_s": "0",
    }  # fmt: skip

    for refused in (["--max-engines", "-1"], ["--rate-limit-rpm", "0"], ["--allow-image", "a b"]):
        assert operator.refused("product", "policy", slug, *refused) == (2, "INVALID_REQUEST")
    assert operator.refused("product", "policy", "no-such-product") == (4, "PRODUCT_NOT_FOUND")
    assert operator.refused("product", "policy", str(uuid4())) == (4, "PRODUCT_NOT_FOUND")


def test_the_life_of_an_engine(product: September) -> None:
    user = "a user/ü"
    made = product.json("engine", "provision", user)
    assert (made["user_id"], made["status"]) == (user, "running")
    assert made["api_key"].startswith("sk-sept-")
    assert product.refused("engine", "provision", user) == (5, "ENGINE_ALREADY_EXISTS")

    engine = product.json("engine", "get", user)
    assert made.items() <= engine.items()
    assert re.fullmatch(TIME, engine["created_at"])
    assert list(product("engine", "get", user).record) == [
        "engine_id", "user_id", "status", "url", "api_key", "engine_version", "created_at", "last_health_at",
    ]  # fmt: skip
    assert product.refused("engine", "start", user) == (5, "ENGINE_ALREADY_RUNNING")

    assert product.json("engine", "sleep", user) == {"status": "sleeping"}
    assert product.json("engine", "wake", user) == {"status": "running", "url": engine["url"]}
    assert product("engine", "stop", user).record == {"status": "stopped"}
    for command in ("stop", "wake", "rotate-key"):
        assert product.refused("engine", command, user) == (5, "ENGINE_NOT_RUNNING")
    assert product("engine", "start", user).record["status"] == "running"

    rotated = product("engine", "rotate-key", user).record["api_key"]
    assert rotated not in (engine["api_key"], "")
    eventually(lambda: product.json("engine", "get", user)["api_key"] == rotated, "the new key is given out")

    told = product.json("engine", "history", user)
    assert told["status"] == "running"
    done = [event["action"] for event in reversed(told["events"]) if event["outcome"] == "succeeded"]
    assert done == ["provision", "sleep", "wake", "stop", "start", "rotate_key"]
    history = product("engine", "history", user, "--limit", "1")
    assert history.rows[0] == ["status", "running"]
    assert history.rows[-1][1:5] == ["rotate_key", "succeeded", told["events"][0]["actor"], user]

    gone = product.json("engine", "destroy", user, "--yes")
    assert gone == {"status": "destroyed", "engine_id": engine["engine_id"]}
    for command in ("start", "history", "watch"):
        assert product.refused("engine", command, user) == (4, "ENGINE_NOT_FOUND")
    assert product.refused("engine", "destroy", user, "--yes") == (4, "ENGINE_NOT_FOUND")


def test_a_command_that_is_repeated_with_its_key_has_one_effect(operator: September) -> None:
    slug, key = new_slug(), ("--idempotency-key", str(uuid4()))
    registered = operator("product", "register", slug, "--max-engines", "2", *key)
    assert operator("product", "register", slug, "--max-engines", "2", *key).record == registered.record
    assert operator.refused("product", "register", slug, "--max-engines", "3", *key) == (5, "IDEMPOTENCY_CONFLICT")
    assert operator.refused("product", "disable", slug, "--idempotency-key", "ä") == (2, "INVALID_REQUEST")
    product = operator.with_(PLATFORM_KEY=registered.record["platform_api_key"])
    made = product("engine", "provision", "ann", *key)
    assert product("engine", "provision", "ann", *key).record == made.record
    assert product.refused("engine", "provision", "ann") == (5, "ENGINE_ALREADY_EXISTS")


def test_admit_gives_url_and_key_or_the_denial(product: September) -> None:
    denied = product("admit", "eve")
    assert (denied.code, denied.out) == (3, "")
    assert denied.err.startswith("not admitted: engine_not_found; ")
    assert denied.err.count("\n") == 1
    assert product.json("admit", "eve", code=3) == {"admitted": False, "reason": "engine_not_found"}

    admitted = product("admit", "eve", "--auto-provision")
    assert admitted.code == 0, admitted
    assert list(admitted.record) == ["url", "api_key"]
    assert product.json("admit", "eve")["engine"].items() >= admitted.record.items()

    assert product("engine", "stop", "eve").code == 0
    eventually(lambda: product.json("engine", "get", "eve")["status"] == "stopped", "Admission knows it")
    assert product.json("admit", "eve", "--auto-wake", code=3)["reason"] == "engine_sleeping"


def test_admit_wakes_and_keeps_awake(product: September) -> None:
    product.json("engine", "provision", "owl")
    product.json("engine", "sleep", "owl")
    eventually(lambda: product("admit", "owl").code == 3, "Admission knows that it sleeps")
    assert product("admit", "owl", "--auto-wake", "--keep-awake-s", "600").code == 0

    def kept() -> bool:
        return bool(product("engine", "history", "owl").rows[4][1])

    eventually(kept, "it is kept awake")


def test_what_is_over_a_limit_has_its_exit_code(operator: September) -> None:
    full = register(operator, "--max-engines", "0")
    assert full.refused("engine", "provision", "ada") == (6, "QUOTA_EXCEEDED")
    assert full.refused("admit", "ada", "--auto-provision") == (6, "QUOTA_EXCEEDED")
    slow = register(operator, "--max-engines", "0", "--rate-limit-rpm", "1")
    assert slow("admit", "ada").code == 3
    limited = slow("admit", "ada")
    assert limited.code == 6
    assert re.fullmatch(r"RATE_LIMITED: [^\n]*; try again in (5\d|60) s\n", limited.err)


def test_keys_decide_and_a_missing_one_is_a_wrong_one(operator: September, product: September) -> None:
    nobody = September({k: v for k, v in operator.environment.items() if k != "ADMIN_KEY"})
    stranger = nobody.with_(PLATFORM_KEY=new_platform_key(), ADMIN_KEY="wrong")
    for without in (nobody, stranger):
        assert without.refused("admit", "ada") == (8, "INVALID_PLATFORM_KEY")
        assert without.refused("engine", "list") == (8, "INVALID_PLATFORM_KEY")
        assert without.refused("product", "list") == (8, "INVALID_ADMIN_KEY")
    assert product.refused("engine", "provision", "ada", "--engine-version", "other/image") == (8, "POLICY_DENIED")
    # An option stands before the environment.
    key = product.environment["PLATFORM_KEY"]
    assert stranger("engine", "list", "--platform-key", key).code == 0


def test_errors_are_the_envelope_of_rest_for_scripts(operator: September, product: September) -> None:
    assert product.json("engine", "get", "nobody", code=4) == {
        "error": {"code": "ENGINE_NOT_FOUND", "message": "no engine for this user_id"}
    }
    assert operator.json("product", "get", "no-such-product", code=4)["error"]["code"] == "PRODUCT_NOT_FOUND"
    assert operator.json("admit", "ada", code=8)["error"]["code"] == "INVALID_PLATFORM_KEY"


def test_where_nothing_answers_it_is_said_what_to_start(product: September) -> None:
    nowhere = product.with_(PROVISIONER_ADDR="127.0.0.1:1", ADMISSION_ADDR="127.0.0.1:1")
    for command in (["engine", "list"], ["admit", "ada"], ["engine", "watch", "ada"], ["fleet", "status"]):
        assert nowhere.refused(*command) == (7, "UNAVAILABLE")
    assert "127.0.0.1:1" in (said := nowhere("fleet", "status").err)
    assert "september up" in said
    option = product("engine", "list", "--provisioner", "127.0.0.1:2")
    assert (option.code, "127.0.0.1:2" in option.err) == (7, True)


def test_wrong_arguments_are_refused_there(product: September) -> None:
    for arguments in (
        ["engine", "list", "--status", "asleep"],
        ["audit", "--action", "nonsense"],
        ["engine", "get", ""],
        ["engine", "get", "a\nb"],
        ["admit", "ada", "--keep-awake-s", "-1"],
    ):
        assert product.refused(*arguments) == (2, "INVALID_REQUEST")


def test_lists_go_page_by_page_and_show_no_key(operator: September) -> None:
    product = register(operator)
    for user in ("u1", "u2"):
        product.json("engine", "provision", user)
    product.json("engine", "stop", "u2")

    listed = product("engine", "list")
    assert [row[:2] for row in listed.rows] == [["u1", "running"], ["u2", "stopped"]]
    page = product.json("engine", "list", "--limit", "1")
    assert ([e["user_id"] for e in page["engines"]], page["total"]) == (["u1"], 2)
    assert page["next_page_token"]
    everything = product.json("engine", "list", "--all", "--limit", "1")
    assert [e["user_id"] for e in everything["engines"]] == ["u1", "u2"]
    assert "next_page_token" not in everything
    assert [row[0] for row in product("engine", "list", "--status", "stopped").rows] == ["u2"]

    events = product.json("audit", "--all")
    product_id = events["events"][0]["product_id"]
    of_all = operator("engine", "list", "--all-products", "--all").rows
    assert [row[0] for row in of_all if row[-1] == product_id] == ["u1", "u2"]
    assert product.refused("engine", "list", "--all-products") == (8, "INVALID_ADMIN_KEY")
    assert "-sept-" not in f"{listed}{everything}{events}"


def test_the_fleet_is_the_products_own_or_all_of_it(operator: September) -> None:
    product = register(operator)
    product.json("engine", "provision", "ada")
    product.json("engine", "stop", "ada")
    status = product.json("fleet", "status")
    assert status["by_status"]["stopped"] == 1
    assert (status["total"], status["health"], status["unhealthy_count"]) == (1, "ok", 0)
    shown = product("fleet", "status").record
    assert shown["total"] == "1"
    assert shown["by_status"].endswith("running 0, sleeping 0, stopped 1")
    assert "warm_pool" not in {**status, **shown}
    register(operator).json("engine", "provision", "bob")
    every = operator.with_(**product.environment)
    assert every.json("fleet", "status")["total"] > 1
    assert every.json("fleet", "status")["warm_pool"] == {"ready": 0, "booting": 0}
    assert every("fleet", "status").record["warm_pool"] == "ready 0, booting 0"
    assert every("fleet", "metrics").record["total_claims"] == "0"
    metrics = product.json("fleet", "metrics")
    assert (metrics["provisions_1h"], metrics["total_provisions"], metrics["total_destroys"]) == (1, 1, 0)
    assert int(product("fleet", "metrics").record["avg_boot_ms"]) == round(metrics["avg_boot_ms"]) > 0


def test_the_audit_log_is_filtered(operator: September) -> None:
    product = register(operator)
    for user in ("u1", "u2"):
        product.json("engine", "provision", user)
    assert [row[1:5:3] for row in product("audit").rows] == [
        ["provision", "u2"], ["provision", "u2"], ["provision", "u1"], ["provision", "u1"], ["policy_register", ""],
    ]  # fmt: skip
    everything = product.json("audit", "--all", "--action", "provision")
    assert [(e["user_id"], e["outcome"]) for e in everything["events"]] == [
        ("u2", "succeeded"), ("u2", "requested"), ("u1", "succeeded"), ("u1", "requested"),
    ]  # fmt: skip
    assert [row[4] for row in product("audit", "--user", "u1").rows] == ["u1", "u1"]
    one = product.json("audit", "--limit", "1", "--action", "provision")
    assert one["events"] == everything["events"][:1]
    assert one["next_page_token"]

    product_id = everything["events"][0]["product_id"]
    slug = operator.json("product", "get", product_id)["product"]["slug"]
    for named in (product_id, slug):
        assert operator.json("audit", "--all", "--action", "provision", "--product", named) == everything
    assert operator.refused("audit", "--product", "no-such-product") == (4, "PRODUCT_NOT_FOUND")


def test_the_platform_of_this_machine_is_found_by_itself(product: September, tmp_path: Path) -> None:
    names = ("ADMISSION_ADDR", "PROVISIONER_ADDR", "PLATFORM_KEY")
    bare = September({k: v for k, v in product.environment.items() if k not in names}).with_(ORCH_VAR_DIR=str(tmp_path))
    missing = bare("engine", "list")
    assert (missing.code, "september up" in missing.err) == (7, True)
    with VarDirectory(tmp_path).announced({name: product.environment[name] for name in names}):
        assert bare("engine", "list").code == 0
        assert bare("admit", "nobody").code == 3


def test_a_watch_lives_through_restarts_of_the_provisioner(platform: Platform, operator: September) -> None:
    provisioner = platform.provisioner()
    listen = provisioner.address
    product = register(operator.with_(PROVISIONER_ADDR=listen, ADMIN_KEY=platform.admin_key))
    product.json("engine", "provision", "ada")
    with product.running("engine", "watch", "ada", "--json") as watch:
        assert watch.stdout is not None
        lines = iter(watch.stdout)

        def seen() -> dict[str, str]:
            event: dict[str, str] = json.loads(next(lines))
            assert re.fullmatch(TIME, event.pop("at"))
            return event

        assert seen() == {"status": "running", "operation": "", "step": ""}
        for end in (Service.kill, Service.terminate):
            end(provisioner)
            provisioner = platform.provisioner(ORCH_PROVISIONER_LISTEN=listen)
        product.json("engine", "stop", "ada")
        while (event := seen())["operation"] or event["status"] == "running":
            pass
        assert event == {"status": "stopped", "operation": "", "step": ""}
        product.json("engine", "destroy", "ada", "--yes")
        assert {event["status"] for event in map(json.loads, lines)} == {"destroying"}
        assert watch.wait(DEADLINE_S) == 0
        assert watch.stderr is not None
        assert watch.stderr.read() == ""


def test_ctrl_c_ends_a_watch_without_a_word(product: September) -> None:
    product.json("engine", "provision", "watched")
    with product.running("engine", "watch", "watched") as watch:
        assert watch.stdout is not None
        assert re.fullmatch(rf"{TIME}\trunning\t\t\n", watch.stdout.readline())
        watch.send_signal(signal.SIGINT)
        assert watch.communicate(timeout=DEADLINE_S) == ("", "")
        assert watch.returncode == 130


def test_a_terminal_gets_tables_with_relative_times(operator: September) -> None:
    slow = "tests.engines.slow_boot"
    product = register(operator, "--max-engines", "1", "--allow-image", slow)
    made = product.on_a_terminal("engine", "provision", "tom", "--engine-version", slow)
    assert made.code == 0, made
    assert "tom: provision probing" in made.out
    assert re.search(r"url\W.*http://127\.0\.0\.1:\d+", made.out)
    listed = product.on_a_terminal("engine", "list").out
    assert re.search(r"user id.*status.*url.*engine version.*created", listed)
    assert re.search(r"tom .*running.* \d+ s ago", listed)
    assert "There are more: --all shows them." in product.on_a_terminal("audit", "--limit", "1").out
    # JSON is for scripts, terminal or not.
    assert json.loads(product.on_a_terminal("engine", "stop", "tom", "--json").out) == {"status": "stopped"}


def test_a_destroy_asks_whoever_can_answer(product: September) -> None:
    product.json("engine", "provision", "kept")
    refused = product.on_a_terminal("engine", "destroy", "kept", answer="n\n")
    assert (refused.code, "engine of kept" in refused.out) == (1, True)
    assert product("engine", "get", "kept").code == 0
    assert product.on_a_terminal("engine", "destroy", "kept", answer="y\n").code == 0
    assert product.refused("engine", "destroy", "kept", "--yes")[0] == 4


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("engine list --status ", ["provisioning", "running", "sleeping", "stopped", "failed", "destroying"]),
        ("audit --action ", [*AuditAction]),
    ],
)
def test_shells_complete_values(operator: September, words: str, values: list[str]) -> None:
    line = f"september {words}"
    asked = operator.with_(
        _SEPTEMBER_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(line.split(" ")) - 1)
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("september")], env=asked.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == values
