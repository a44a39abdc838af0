"""The ledger of shares in PostgreSQL answers like the one in memory, on which the replica's side is tested."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from itertools import accumulate, count
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row, scalar_row

from services.admission.ratelimit_ledger import Claim
from services.provisioner.store.migrations import migrate
from services.shared import queries
from tests.harness import DEADLINE_S, eventually
from tests.rate_ledger import Ledger

# All moments are multiples of 1/64 s, and so exact on both sides.
WINDOW_S = 64.0
STALE_OK_S = 128.0
LEASE_S = 0.25
ANSWER_S = 1.0
PROMISED_S = 2.0
STEPS_S = (0, 1 / 64, 0.125, 0.25, 1.0, 8.0)
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
SQL = queries.load(files("services.admission") / "sql" / "rate_limit.sql")


def any_claim(chance: random.Random, product_id: UUID, share: int) -> Claim:
    """What a replica could say that has such a share."""
    bound = chance.randint(0, share)
    lasting = sorted((chance.randint(0, bound) for _ in range(60)), reverse=True)
    need = lasting[0] + chance.choice((0, 0, 1, 3, 40))
    return Claim(product_id, bound, need, chance.choice((None, 0, bound - lasting[0], bound)), lasting)


@pytest.fixture
async def product_id(database_url: str) -> UUID:
    await migrate(database_url)
    return uuid4()


@pytest.fixture
def connection(database_url: str, product_id: UUID) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A session on a clock that is turned by hand; there is a product with a limit of 50."""
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as connection:
        connection.execute(
            """
            CREATE SCHEMA turned;
            CREATE TABLE turned.clock AS SELECT now() AS at;
            CREATE FUNCTION turned.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
                AS 'SELECT at FROM turned.clock';
            SET search_path = turned, pg_catalog, public;
            """
        )
        connection.execute(
            "INSERT INTO products (product_id, slug, max_engines, rate_limit_rpm, allowed_images)"
            " VALUES (%s, 'p', 1, 50, '{}')",
            [product_id],
        )
        connection.execute("INSERT INTO rate_limiters (product_id) VALUES (%s)", [product_id])
        yield connection


@pytest.mark.parametrize("seed", range(3))
async def test_both_ledgers_answer_alike(
    connection: psycopg.Connection[dict[str, Any]], product_id: UUID, seed: int
) -> None:
    chance = random.Random(seed)
    memory = Ledger(
        50,
        window_s=WINDOW_S,
        stale_ok_s=STALE_OK_S,
        lease_s=LEASE_S,
        answer_s=ANSWER_S,
        promised_s=PROMISED_S,
    )
    numbers = count(1)
    shares: dict[UUID, int] = {}
    replicas = [uuid4() for _ in range(3)]
    fixed = {
        "window_s": WINDOW_S,
        "stale_ok_s": STALE_OK_S,
        "lease_s": LEASE_S,
        "slack_s": ANSWER_S,
        "error_s": 2 * ANSWER_S,
        "promised_s": PROMISED_S,
    }
    granted = refused = 0
    for at in accumulate(chance.choice(STEPS_S) for _ in range(400)):
        connection.execute("UPDATE turned.clock SET at = %s", [EPOCH + timedelta(seconds=at)])
        index = chance.randrange(3)
        event = chance.random()
        if event < 0.03:
            memory.bury(replicas[index], at)
            connection.execute(SQL["forget_replica"], {**fixed, "replica_id": replicas[index]})
        elif event < 0.05:
            memory.leave(replicas[index], at)
            connection.execute(SQL["leave"], {"replica_id": replicas[index]})
        elif event < 0.07:
            memory.limit = chance.randint(1, 80)
            connection.execute("UPDATE products SET rate_limit_rpm = %s", [memory.limit])
        else:
            if event < 0.10:
                # Another comes in the place of one, which may never be known to be dead.
                replicas[index] = uuid4()
            claim = any_claim(chance, product_id, shares.get(replicas[index], 0))
            claim_no = next(numbers)
            expected = memory.claim(replicas[index], claim_no, claim, at)
            values: dict[str, Any] = {
                **fixed,
                "replica_id": replicas[index],
                "claim_no": claim_no,
                "claims": json.dumps([asdict(claim)], default=str),
                "spare": [],
                "seen": EPOCH + timedelta(seconds=at),
                "step": 0,
                "elapsed_s": 0,
                "watched_s": 1000,
            }
            row = connection.execute(SQL["claim_shares"], values).fetchone()
            assert row is not None
            if row["product_id"] is None or expected is None:
                assert row["product_id"] is None
                assert expected is None
                refused += 1
                continue
            shares[replicas[index]] = claim.bound + expected.granted
            answer = {key: row[key] for key in ("granted", "cap", "keep", "reclaimable", "wait_s")}
            assert answer == pytest.approx(asdict(expected), abs=1e-3), f"at {at}"
            granted += expected.granted
    assert granted
    assert refused


class Replica:
    """Of `SqlLedger` what it says: a claim that binds it to what it was granted, and what it was told before.

    All on the clock that is turned by hand, and on one that is not set, `elapsed_s`.
    """

    def __init__(self, connection: psycopg.Connection[dict[str, Any]], product_id: UUID) -> None:
        self.replica_id = uuid4()
        self.share = 0
        self.told: dict[str, Any] = {"at": None, "step": None}
        self._connection = connection
        self._product_id = product_id
        self._numbers = count(1)

    def values(self, need: int, *, elapsed_s: float = 0, watched_s: float = 0) -> dict[str, Any]:
        claim = Claim(self._product_id, self.share, need, 0, [self.share] * 60)
        return {
            "replica_id": self.replica_id,
            "claim_no": next(self._numbers),
            "claims": json.dumps([asdict(claim)], default=str),
            "spare": [],
            "seen": self.told["at"],
            "step": self.told["step"],
            "elapsed_s": elapsed_s,
            "watched_s": watched_s,
            "window_s": WINDOW_S,
            "stale_ok_s": STALE_OK_S,
            "lease_s": LEASE_S,
            "slack_s": ANSWER_S,
        }

    def claims(self, need: int, *, elapsed_s: float = 0, watched_s: float = 0) -> None:
        values = self.values(need, elapsed_s=elapsed_s, watched_s=watched_s)
        *grants, self.told = self._connection.execute(SQL["claim_shares"], values).fetchall()
        self.share += sum(grant["granted"] for grant in grants)


def turn(connection: psycopg.Connection[dict[str, Any]], **by: float) -> None:
    connection.execute("UPDATE turned.clock SET at = at + %s", [timedelta(**by)])


async def test_who_was_told_a_moment_after_the_clock_was_set_does_not_set_it_back(
    connection: psycopg.Connection[dict[str, Any]], product_id: UUID
) -> None:
    old, new = Replica(connection, product_id), Replica(connection, product_id)
    old.claims(1)
    first = old.told
    turn(connection, hours=-2)
    new.claims(1)
    assert new.told["at"] == first["at"] - timedelta(hours=2)
    for replica in (old, new, old, new):
        replica.claims(1)
        assert replica.told["at"] == first["at"]
        assert replica.told["step"] == first["step"] + 1


@pytest.mark.parametrize("hours", [1, -1])
async def test_whoever_asks_first_after_the_clock_was_set_nobody_loses_a_share_to_another(
    connection: psycopg.Connection[dict[str, Any]], product_id: UUID, hours: int
) -> None:
    """The limit is 50."""
    old, new = Replica(connection, product_id), Replica(connection, product_id)
    old.claims(40)
    turn(connection, hours=hours)
    for _ in range(3):
        new.claims(50)
    # Beside what it needed it has half of what nobody did.
    assert (old.share, new.share) == (45, 5)
    # Which corrects the clock.
    for watched_s in (STALE_OK_S + WINDOW_S + ANSWER_S, 0, 0):
        old.claims(50, watched_s=watched_s)
    assert (old.share, new.share) == (45, 5)


async def test_a_share_that_is_not_heard_of_ends_once_it_was_watched_for_as_long_as_it_holds(
    connection: psycopg.Connection[dict[str, Any]], product_id: UUID
) -> None:
    lost, other = Replica(connection, product_id), Replica(connection, product_id)
    lost.claims(50)
    other.claims(50)
    holds_s = STALE_OK_S + WINDOW_S + ANSWER_S
    turn(connection, seconds=holds_s)
    other.claims(50, elapsed_s=holds_s, watched_s=holds_s - 1)
    assert other.share == 0
    other.claims(50, watched_s=holds_s)
    assert other.share == 50


async def test_a_statement_that_comes_after_a_later_one_does_not_set_the_clock(
    connection: psycopg.Connection[dict[str, Any]], product_id: UUID
) -> None:
    replica = Replica(connection, product_id)
    replica.claims(1)
    late = replica.values(1)
    replica.claims(1)
    turn(connection, seconds=2.5)
    assert connection.execute(SQL["claim_shares"], late).fetchall() == []
    row = connection.execute("SELECT ahead, step FROM rate_clock").fetchone()
    assert row == {"ahead": timedelta(0), "step": 0}


async def test_who_has_waited_for_a_lock_is_dated_by_its_end(
    connection: psycopg.Connection[dict[str, Any]], product_id: UUID, database_url: str
) -> None:
    connection.execute("RESET search_path")
    replica = Replica(connection, product_id)
    with (
        psycopg.connect(database_url) as holder,
        psycopg.connect(database_url, autocommit=True, row_factory=scalar_row) as watching,
        ThreadPoolExecutor() as threads,
    ):
        holder.execute("SELECT FROM rate_limiters FOR UPDATE")
        claimed = threads.submit(replica.claims, 1)
        waiting = f"SELECT clock_timestamp() FROM pg_locks WHERE NOT granted AND pid = {connection.info.backend_pid}"
        since = eventually(lambda: watching.execute(waiting.encode()).fetchone(), "it waits")
        later = "SELECT clock_timestamp() WHERE clock_timestamp() > %s + interval '1 second'"
        released = eventually(lambda: watching.execute(later, [since]).fetchone(), "a second passes")
        holder.rollback()
        claimed.result(DEADLINE_S)
        assert watching.execute("SELECT heard_at FROM rate_shares").fetchone() > released
    assert replica.told["at"] > released


async def test_all_that_the_share_of_a_dead_one_allowed_counts_if_the_clock_was_set_meanwhile(
    connection: psycopg.Connection[dict[str, Any]], product_id: UUID
) -> None:
    dead, other = Replica(connection, product_id), Replica(connection, product_id)
    other.claims(0)
    turn(connection, hours=-1)
    dead.claims(50)
    connection.execute(
        SQL["forget_replica"],
        {"replica_id": dead.replica_id, "window_s": WINDOW_S, "promised_s": PROMISED_S, "error_s": 2 * ANSWER_S},
    )
    held = other.share
    other.claims(50)
    assert other.share == held
    turn(connection, seconds=WINDOW_S + 2 * ANSWER_S)
    other.claims(50, elapsed_s=WINDOW_S + 2 * ANSWER_S)
    assert other.share == 50


@pytest.mark.parametrize("ending", ["forget_replica", "leave"])
async def test_the_shares_of_one_that_ends_are_locked_in_the_order_of_claims(
    connection: psycopg.Connection[dict[str, Any]], product_id: UUID, database_url: str, ending: str
) -> None:
    first, second = sorted((uuid4(), uuid4()))
    replica_id = uuid4()
    # As they lie in the table, the other way round.
    for product in (second, first):
        connection.execute(
            "INSERT INTO products (product_id, slug, max_engines, allowed_images) VALUES (%s, %s, 1, '{}')",
            [product, str(product)],
        )
        connection.execute("INSERT INTO rate_limiters (product_id) VALUES (%s)", [product])
        connection.execute(
            "INSERT INTO rate_shares (product_id, replica_id, share, need, unknown, lasting, heard_at, until)"
            " VALUES (%s, %s, 1, 1, 1, '{1}', now(), now())",
            [product, replica_id],
        )
    lock = "SELECT FROM rate_shares WHERE product_id = %s FOR UPDATE NOWAIT"
    values = {"replica_id": replica_id, "window_s": WINDOW_S, "promised_s": PROMISED_S, "error_s": 2 * ANSWER_S}
    with psycopg.connect(database_url) as claiming, ThreadPoolExecutor() as threads:
        claiming.execute(lock, [first])
        ended = threads.submit(connection.execute, SQL[ending], values)
        with psycopg.connect(database_url, autocommit=True) as watching:
            eventually(
                lambda: watching.execute("SELECT FROM pg_locks WHERE NOT granted").fetchone() is not None, "it waits"
            )
        claiming.execute(lock, [second])
        claiming.rollback()
        ended.result(DEADLINE_S)
