"""The warm pool's transactions against each other, on a real registry and without engines."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from cryptography.fernet import Fernet

from services.provisioner.domain.intent import Newborn
from services.provisioner.domain.policy import Policy
from services.provisioner.domain.product import Product
from services.provisioner.store.intents import IntentStore
from services.provisioner.store.migrations import migrate
from services.provisioner.store.ports import PortAllocator
from services.provisioner.store.products import ProductStore
from services.provisioner.store.warm_pool import WarmPoolStore
from services.shared.errors import QuotaExceeded
from services.shared.keys import EngineKeyring
from services.shared.postgres import Database

IMAGE = "services.engine"


class Pool:
    """A pool in a registry of its own."""

    def __init__(self, database: Database) -> None:
        self.database = database
        intents = IntentStore(
            database,
            node="local",
            platform_image=IMAGE,
            ports=PortAllocator("local", range(20000, 20100)),
            url_of=lambda engine_id, port: f"http://127.0.0.1:{port}",
            check_disk=lambda: None,
        )
        self.intents = intents
        self.store = WarmPoolStore(database, intents, node="local")
        self.keyring = EngineKeyring([Fernet.generate_key().decode()])

    async def query(self, sql: Any, *parameters: Any) -> list[Any]:
        async with self.database.connection() as connection:
            cursor = await connection.execute(sql, parameters)
            return await cursor.fetchall() if cursor.description else []

    async def product(self, max_engines: int) -> UUID:
        product = Product(uuid4(), f"p{uuid4().hex[:8]}", Policy(max_engines, None, ()))
        assert await ProductStore(self.database).insert(product, uuid4().bytes * 2, "test")
        return product.product_id

    async def refill(self, size: int, most_booting: int = 100) -> bool:
        make = lambda: Newborn.of(IMAGE, self.keyring)  # noqa: E731
        return await self.store.refill(make, size=size, most_booting=most_booting)

    async def boot_all(self) -> None:
        """As if every boot had succeeded."""
        await self.query(
            "UPDATE operations SET outcome = 'succeeded', finished_at = clock_timestamp()"
            " WHERE kind = 'provision' AND finished_at IS NULL"
        )
        await self.query("UPDATE engines SET status = 'running' WHERE status = 'provisioning'")

    async def claim(self, member: Any, product_id: UUID, user_id: str, fresh_s: float = 10) -> Any:
        now = time.monotonic()
        return await self.store.claim(member, product_id, user_id, "test", begun=now, fresh_until=now + fresh_s)


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    await migrate(database_url)
    database = Database(database_url, application_name="test", max_size=16)
    await database.open()
    yield Pool(database)
    await database.close()


async def test_many_who_fill_at_once_fill_no_place_twice(pool: Pool) -> None:
    for size in range(2, 12, 3):
        filled = await asyncio.gather(*(pool.refill(size) for _ in range(16)))
        assert len(await pool.store.members()) == size
        assert sum(filled) in (2, 3)


async def test_only_so_many_members_boot_at_once(pool: Pool) -> None:
    assert [await pool.refill(8, most_booting=2) for _ in range(3)] == [True, True, False]
    await pool.boot_all()
    assert [await pool.refill(8, most_booting=2) for _ in range(3)] == [True, True, False]


async def test_a_boot_that_failed_makes_the_pool_pause(pool: Pool) -> None:
    assert await pool.refill(8)
    await pool.query("UPDATE operations SET outcome = 'failed', finished_at = clock_timestamp()")
    assert not await pool.refill(8)
    await pool.query("UPDATE operations SET finished_at = finished_at - interval '1 minute'")
    assert await pool.refill(8)


async def test_a_member_whose_boot_was_given_up_is_told_of_and_can_be_dropped(pool: Pool) -> None:
    await pool.refill(1)
    await pool.query("UPDATE operations SET quarantined_at = clock_timestamp()")
    (member,) = await pool.store.members()
    assert member.stuck
    await pool.store.drop(member)
    assert await pool.store.members() == []
    operations = await pool.query("SELECT kind, outcome FROM operations ORDER BY created_at")
    assert [tuple(row.values()) for row in operations] == [("provision", "cancelled"), ("destroy", None)]
    assert await pool.refill(1)


async def test_a_member_is_given_to_one_of_many_who_claim_and_drop_it(pool: Pool) -> None:
    products = [await pool.product(100) for _ in range(4)]
    for turn in range(10):
        await pool.refill(1)
        await pool.boot_all()
        (member,) = await pool.store.candidates(IMAGE, products[0], "nobody")
        claims = [pool.claim(member, products[i % 4], f"u{turn}-{i}") for i in range(12)]
        dropping = turn % 2 == 0
        given = await asyncio.gather(*claims, *([pool.store.drop(member)] if dropping else []))
        engines = [engine for engine in given if engine is not None]
        ((owned, status),) = [
            (row["product_id"] is not None, row["status"])
            for row in await pool.query("SELECT * FROM engines WHERE engine_id = %s", member.engine_id)
        ]
        assert (len(engines), status) == ((1, "running") if owned else (0, "destroying"))
        assert owned or dropping
        assert await pool.store.members() == []


async def test_claims_and_boots_of_one_product_together_keep_its_quota(pool: Pool) -> None:
    product_id = await pool.product(10)
    while await pool.refill(12):
        pass
    await pool.boot_all()
    members = await pool.store.candidates(IMAGE, product_id, "nobody")

    async def add(index: int) -> bool:
        try:
            if index % 2:
                newborn = Newborn.of(IMAGE, pool.keyring)
                await pool.intents.provision(product_id, f"u{index}", newborn, "test")
            else:
                assert await pool.claim(members[index // 2], product_id, f"u{index}") is not None
        except QuotaExceeded:
            return False
        return True

    assert sum(await asyncio.gather(*(add(i) for i in range(24)))) == 10
    ((owned,),) = [
        tuple(row.values())
        for row in await pool.query("SELECT count(*) FROM engines WHERE product_id = %s", product_id)
    ]
    assert owned == 10


async def test_a_member_is_not_claimed_on_a_look_of_long_ago(pool: Pool) -> None:
    product_id = await pool.product(10)
    await pool.refill(1)
    await pool.boot_all()
    (member,) = await pool.store.candidates(IMAGE, product_id, "ada")
    assert await pool.claim(member, product_id, "ada", fresh_s=-1) is None
    assert await pool.claim(member, product_id, "ada") is not None


async def test_a_user_who_has_an_engine_is_offered_none(pool: Pool) -> None:
    product_id = await pool.product(10)
    while await pool.refill(2):
        pass
    await pool.boot_all()
    member, _ = await pool.store.candidates(IMAGE, product_id, "ada")
    assert await pool.claim(member, product_id, "ada") is not None
    assert await pool.store.candidates(IMAGE, product_id, "ada") == []
    assert len(await pool.store.candidates(IMAGE, product_id, "eve")) == 1
