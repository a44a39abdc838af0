"""Giving up a master key: `september keys rotate` and `status`, beside services that go on."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from cryptography.fernet import Fernet
from psycopg import AsyncConnection

from services.provisioner.master_key import MasterKeyRotation
from services.provisioner.store.encrypted import COLUMNS, EncryptedStore
from services.provisioner.store.migrations import migrate
from services.shared.keys import EngineKeyring
from services.shared.postgres import Database
from tests.harness import ROOT, Clients, Platform, eventually
from tests.integration.test_life_cycle import User

Connect = Callable[..., Clients]
OLD, NEW = Fernet.generate_key().decode(), Fernet.generate_key().decode()
BOTH = EngineKeyring([NEW, OLD])


def start(command: str, url: str, *master_keys: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "services.cli", "keys", command],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "ORCH_DATABASE_URL": url, "ORCH_MASTER_KEY": ",".join(master_keys)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def keys(command: str, url: str, *master_keys: str) -> tuple[int, list[str], str]:
    """Exit code and what is said on standard output and standard error; never a key."""
    with start(command, url, *master_keys) as process:
        output, errors = process.communicate(timeout=60)
    assert not [secret for secret in (*master_keys, "sk-sept", "gAAAA", "Traceback") if secret in output + errors]
    return process.returncode, output.splitlines(), errors


def connected(observer: "psycopg.Connection[Any]", application: str) -> bool:
    asked = "SELECT FROM pg_stat_activity WHERE application_name = %s"
    return observer.execute(asked, [application]).fetchone() is not None


def waiting(observer: "psycopg.Connection[Any]", application: str) -> bool:
    """Whether it waits for a lock."""
    asked = "SELECT FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'"
    return observer.execute(asked, [application]).fetchone() is not None


def silent(seen: int, total: int) -> None:
    """Nobody wants to know how far it is."""


class Rows:
    """Rows of engines that nobody runs, and their keys."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys: dict[UUID, str] = {}

    def add(self, count: int, *, pending: bool = False, master_key: str = OLD) -> list[UUID]:
        keyring = EngineKeyring([master_key])
        added = {uuid4(): f"sk-{i}" for i in range(count)}
        with psycopg.connect(self.url) as connection, connection.cursor() as cursor:
            product_id = uuid4()
            cursor.execute(
                "INSERT INTO products (product_id, slug, max_engines, allowed_images) VALUES (%s, %s, 9, '{}')",
                [product_id, str(product_id)],
            )
            cursor.executemany(
                "INSERT INTO engines"
                " (engine_id, product_id, user_id, status, image, node, url, encrypted_key, pending_key)"
                " VALUES (%s, %s, %s, 'stopped', '', 'elsewhere', '', %s, %s)",
                [
                    (
                        engine_id,
                        product_id,
                        key,
                        keyring.encrypt(engine_id, key),
                        keyring.encrypt(engine_id, f"{key}-p") if pending else None,
                    )
                    for engine_id, key in added.items()
                ],
            )
        self.keys |= added
        return list(added)

    def tokens(self) -> dict[UUID, bytes]:
        with psycopg.connect(self.url) as connection:
            return dict(connection.execute("SELECT engine_id, encrypted_key FROM engines").fetchall())

    def check(self) -> None:
        """The new master key alone gives every engine the key that it had."""
        keyring = EngineKeyring([NEW])
        found = {engine_id: keyring.decrypt(engine_id, token) for engine_id, token in self.tokens().items()}
        assert found == self.keys


@pytest.fixture
async def rows(database_url: str) -> Rows:
    await migrate(database_url)
    return Rows(database_url)


@pytest.fixture
async def rotation(rows: Rows) -> AsyncIterator[MasterKeyRotation]:
    database = Database(rows.url, application_name="rotation")
    await database.open()
    yield MasterKeyRotation(EncryptedStore(database), BOTH)
    await database.close()


async def test_after_a_rotation_services_do_without_the_old_master_key(platform: Platform, connect: Connect) -> None:
    old, new, url = platform.environment["ORCH_MASTER_KEY"], NEW, platform.database_url

    def restarted(*master_keys: str) -> Clients:
        for service in platform.services:
            service.terminate()
        provisioner = platform.provisioner(ORCH_MASTER_KEY=",".join(master_keys))
        return connect(platform, provisioner, platform.admission(provisioner, ORCH_MASTER_KEY=",".join(master_keys)))

    clients = restarted(old)
    product = await clients.register()
    users = [User(clients, product, user_id) for user_id in ("awake", "asleep", "stopped", "rotated")]
    before = {user.user_id: (await user.call("Provision")).api_key for user in users}
    await users[1].sleep()
    await users[2].call("Stop")
    before["rotated"] = await users[3].rotate()

    restarted(new, old)
    assert keys("status", url, new, old)[:2] == (
        1,
        [
            "engines.pending_key: 0 under the first master key, 0 under others, 0 unreadable",
            "engines.encrypted_key: 0 under the first master key, 4 under others, 0 unreadable",
            "idempotency_keys.answer: 0 under the first master key, 0 under others, 0 unreadable",
        ],
    )
    assert keys("rotate", url, new, old)[:2] == (
        0,
        [
            "4 encrypted anew",
            "engines.pending_key: 0 under the first master key, 0 under others, 0 unreadable",
            "engines.encrypted_key: 4 under the first master key, 0 under others, 0 unreadable",
            "idempotency_keys.answer: 0 under the first master key, 0 under others, 0 unreadable",
        ],
    )

    clients = restarted(new)
    users = [User(clients, product, user.user_id) for user in users]
    await users[2].call("Start")
    admitted = [await user.admit(auto_wake=True) for user in users]
    assert {answer.engine.user_id: answer.engine.api_key for answer in admitted} == before
    assert await users[0].rotate() not in before.values()


async def test_a_pending_key_is_encrypted_anew_as_well(rows: Rows, rotation: MasterKeyRotation) -> None:
    rows.add(3, pending=True)
    assert await rotation.rotate(silent) == 6
    rows.check()
    with psycopg.connect(rows.url) as connection:
        pending = connection.execute("SELECT engine_id, pending_key FROM engines").fetchall()
    new = EngineKeyring([NEW])
    assert {new.decrypt(engine_id, token) for engine_id, token in pending} == {f"{k}-p" for k in rows.keys.values()}


async def test_a_kept_answer_is_encrypted_anew_as_well(rows: Rows, rotation: MasterKeyRotation) -> None:
    key_id = uuid4()
    with psycopg.connect(rows.url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO idempotency_keys (key_id, request_hash, answer) VALUES (%s, %s, %s)",
            [key_id, b"h" * 32, EngineKeyring([OLD]).encrypt(key_id, "an answer")],
        )
        assert await rotation.rotate(silent) == 1
        row = connection.execute("SELECT answer FROM idempotency_keys").fetchone()
    assert row is not None
    assert EngineKeyring([NEW]).decrypt(key_id, row[0]) == "an answer"


async def test_what_is_new_already_stays_as_it_is_and_nobody_is_told(rows: Rows, rotation: MasterKeyRotation) -> None:
    rows.add(3)
    with psycopg.connect(rows.url, autocommit=True) as connection:
        connection.execute("TRUNCATE changes")
        assert await rotation.rotate(silent) == 3
        tokens = rows.tokens()
        assert await rotation.rotate(silent) == 0
        assert rows.tokens() == tokens
        assert connection.execute("SELECT count(*) FROM changes").fetchone() == (0,)
        # What else changes is still told of.
        connection.execute("UPDATE engines SET encrypted_key = 'another'")
        assert connection.execute("SELECT count(*) FROM changes").fetchone() == (3,)


async def test_what_can_not_be_read_is_named_and_left(rows: Rows) -> None:
    rows.add(3)
    lost, swapped, other, _ = rows.add(4)
    with psycopg.connect(rows.url, autocommit=True) as connection:
        connection.execute("UPDATE engines SET encrypted_key = 'nonsense' WHERE engine_id = %s", [lost])
        connection.execute(
            "UPDATE engines SET encrypted_key = (SELECT encrypted_key FROM engines WHERE engine_id = %s)"
            " WHERE engine_id = %s",
            [other, swapped],
        )
    before = rows.tokens()
    code, output, errors = keys("rotate", rows.url, NEW, OLD)
    assert code == 1
    assert output[:1] + output[2:3] == [
        "5 encrypted anew",
        "engines.encrypted_key: 5 under the first master key, 0 under others, 2 unreadable",
    ]
    assert set(output[3:-1]) == {f"engines.encrypted_key of {engine_id}: unreadable" for engine_id in (lost, swapped)}
    assert errors == "september: 2 can't be read with these master keys, or are another row's\n"
    after = rows.tokens()
    assert {engine_id for engine_id in before if before[engine_id] == after[engine_id]} == {lost, swapped}


async def test_killed_in_the_middle_of_a_batch_it_goes_on_from_there(rows: Rows) -> None:
    rows.add(3_000)
    ids, before = sorted(rows.keys), rows.tokens()

    def old() -> list[UUID]:
        now = rows.tokens()
        return [engine_id for engine_id in ids if now[engine_id] == before[engine_id]]

    with psycopg.connect(rows.url) as holder, psycopg.connect(rows.url, autocommit=True) as observer:
        # What comes before the batch that it waits in is done, and of that nothing is.
        for locked, begun in ((700, 500), (2_400, 2_000)):
            holder.execute("SELECT FROM engines WHERE engine_id = %s FOR UPDATE", [ids[locked]])
            with start("rotate", rows.url, NEW, OLD) as process:
                eventually(lambda: waiting(observer, "september-keys"), "it has come to the engine that is locked")
                process.send_signal(signal.SIGKILL)
            holder.rollback()
            eventually(lambda: not connected(observer, "september-keys"), "PostgreSQL has noticed")
            assert old() == ids[begun:]
    # Two at once, that nobody ends.
    with start("rotate", rows.url, NEW, OLD) as one, start("rotate", rows.url, NEW, OLD) as other:
        said = [int(process.communicate(timeout=60)[0].split()[0]) for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0)
    assert sum(said) == 1_000
    rows.check()


@pytest.mark.parametrize("new_first", [True, False])
async def test_a_key_that_is_rotated_meanwhile_is_not_overwritten(
    rows: Rows, rotation: MasterKeyRotation, *, new_first: bool
) -> None:
    """By a service that has the new master key already, and by one that has not."""
    engine_id, *_ = rows.add(20)
    async with await AsyncConnection.connect(rows.url) as service:
        token = EngineKeyring([NEW if new_first else OLD, OLD]).encrypt(engine_id, "sk-newer")
        await service.execute("UPDATE engines SET encrypted_key = %s WHERE engine_id = %s", [token, engine_id])
        rotating = asyncio.create_task(rotation.rotate(silent))
        with psycopg.connect(rows.url, autocommit=True) as observer:
            await asyncio.to_thread(eventually, lambda: waiting(observer, "rotation"), "it waits for the service")
        await service.commit()
        assert await rotating == 20 - new_first
    rows.keys[engine_id] = "sk-newer"
    rows.check()


async def test_engines_that_come_and_go_meanwhile_disturb_nothing(rows: Rows, rotation: MasterKeyRotation) -> None:
    rows.add(1_500)
    gone = sorted(rows.keys)[::7]

    def come_and_go(seen: int, _total: int) -> None:
        if not gone:
            return
        with psycopg.connect(rows.url) as connection:
            connection.execute("DELETE FROM engines WHERE engine_id = ANY(%s)", [gone])
        for engine_id in gone:
            del rows.keys[engine_id]
        gone.clear()
        rows.add(100, master_key=NEW)

    await rotation.rotate(come_and_go)
    rows.check()
    _, tally, _ = await rotation.status()
    assert (tally.current, tally.old, tally.unreadable) == (len(rows.keys), 0, [])


async def test_every_encrypted_column_is_known(rows: Rows) -> None:
    """A column that is added and not named would lose its keys with the old master key."""
    with psycopg.connect(rows.url) as connection:
        found = connection.execute(
            "SELECT table_name || '.' || column_name FROM information_schema.columns"
            " WHERE table_schema = 'public' AND data_type = 'bytea' AND column_name NOT LIKE '%\\_hash'"
        ).fetchall()
    assert {name for (name,) in found} == {str(column) for column in COLUMNS}


def test_without_a_schema_or_a_registry_it_says_so(database_url: str, tmp_path: Path) -> None:
    code, _, errors = keys("status", database_url, NEW)
    assert (code, errors) == (1, 'september: PostgreSQL: relation "engines" does not exist\n')
    refused = subprocess.run(
        [sys.executable, "-m", "services.cli", "keys", "rotate"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "ORCH_MASTER_KEY": NEW, "ORCH_VAR_DIR": str(tmp_path / "var")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stderr) == (1, f"september: there is no registry under {tmp_path / 'var'}\n")
