"""Operations in the registry: who may take them up, and how many."""

from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import psycopg
import pytest

from services.provisioner.domain.restarts import RestartPolicy
from services.provisioner.store.migrations import migrate
from services.provisioner.store.operations import OperationStore
from services.provisioner.store.ports import PortAllocator
from services.shared.postgres import Database


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[OperationStore]:
    """The operations of a node, with 40 of them waiting."""
    await migrate(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        for index in range(40):
            connection.execute(
                "INSERT INTO operations (operation_id, engine_id, product_id, user_id, node, kind, actor)"
                " VALUES (gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), %s, 'local', 'start', 'system')",
                [f"u{index}"],
            )
        connection.execute("ANALYZE operations")
    database = Database(database_url, application_name="test")
    await database.open()
    yield OperationStore(
        database,
        owner=uuid4(),
        node="local",
        lease_s=0.1,
        boot_timeout_s=60,
        ports=PortAllocator("local", range(0)),
        url_of=lambda engine_id, port: "",
        restarts=RestartPolicy(1, 1, 1),
        stale_ok_s=300,
    )
    await database.close()


async def test_no_more_are_claimed_than_there_is_room_for(store: OperationStore) -> None:
    taken: set[UUID] = set()
    for _ in range(5):
        claimed = await store.claim(8, taken)
        assert len(claimed) == 8
        taken |= {operation.operation_id for operation in claimed}
    assert len(taken) == 40


async def test_what_still_runs_here_is_not_taken_up_again_though_its_lease_ran_out(
    store: OperationStore, database_url: str
) -> None:
    running = {operation.operation_id for operation in await store.claim(40, ())}
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE operations SET lease_until = clock_timestamp() - interval '1 s'")
    assert await store.claim(40, running) == []
    assert len(await store.claim(40, ())) == 40


async def test_what_a_later_version_has_written_is_left_to_it(store: OperationStore, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE operations SET kind = 'migrate' WHERE user_id LIKE 'u1%'")
        connection.execute("UPDATE operations SET step = 'packing' WHERE user_id LIKE 'u2%'")
    assert len(await store.claim(40, ())) == 18
