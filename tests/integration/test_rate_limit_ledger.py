"""The ledger of shares in PostgreSQL answers like the one in memory, on which the replica's side is tested."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from itertools import accumulate, count
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from services.admission.ratelimit_ledger import Claim
from services.provisioner.store.migrations import migrate
from services.shared import queries
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
                "seen": None,
                "ahead": None,
                "elapsed_s": 0,
            }
            row = connection.execute(SQL["claim_shares"], values).fetchone()
            if row is None or expected is None:
                assert row is None
                assert expected is None
                refused += 1
                continue
            shares[replicas[index]] = claim.bound + expected.granted
            answer = {key: row[key] for key in ("granted", "cap", "keep", "reclaimable", "wait_s")}
            assert answer == pytest.approx(asdict(expected), abs=1e-3), f"at {at}"
            granted += expected.granted
    assert granted
    assert refused


async def test_who_was_told_a_moment_after_the_clock_was_set_does_not_set_it_back(
    connection: psycopg.Connection[dict[str, Any]], product_id: UUID
) -> None:
    old, new = uuid4(), uuid4()
    numbers = count(1)

    def told(replica_id: UUID, known: dict[str, Any] | None) -> dict[str, Any]:
        """What a replica is told that knows what it was told, a moment ago."""
        values: dict[str, Any] = {
            "replica_id": replica_id,
            "claim_no": next(numbers),
            "claims": json.dumps([asdict(Claim(product_id, 0, 1, 0, [0] * 60))], default=str),
            "spare": [],
            "seen": known and known["at"],
            "ahead": known and known["ahead"],
            "elapsed_s": 0,
            "window_s": WINDOW_S,
            "stale_ok_s": STALE_OK_S,
            "lease_s": LEASE_S,
            "slack_s": ANSWER_S,
        }
        row = connection.execute(SQL["claim_shares"], values).fetchone()
        assert row is not None
        return row

    first = told(old, None)
    connection.execute("UPDATE turned.clock SET at = at - interval '2 h'")
    wrong = told(new, None)
    assert wrong["at"] == first["at"] - timedelta(hours=2)
    assert told(old, first)["at"] == first["at"]
    assert told(new, wrong)["at"] == first["at"]
    assert told(old, first | {"ahead": timedelta(hours=-2)})["at"] == first["at"]
