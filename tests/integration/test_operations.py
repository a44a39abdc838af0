"""Operations in the registry: who may take them up, how many, and in which order."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from uuid import UUID, uuid4

import grpc
import psycopg
import pytest

from september.provisioner.v1 import provisioner_service_pb2 as pb
from services.provisioner.domain.operation import Outcome, Queue
from services.provisioner.domain.restarts import RestartPolicy
from services.provisioner.store.operations import OperationStore
from services.provisioner.store.ports import PortAllocator
from services.shared.postgres import Database
from tests.harness import Clients, Platform, Product, Service, eventually, reason

Shared = tuple[Platform, list[Service]]
Connect = Callable[..., Clients]
NextProduct = Callable[[OperationStore], Awaitable[UUID | None]]


def queue(database_url: str, count: int, product_id: UUID | None = None, queue: Queue = Queue.BOOT) -> None:
    """Lets so many operations wait: of one product, or each of one of its own."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO operations (operation_id, engine_id, product_id, user_id, node, kind, actor, queue)"
            " SELECT gen_random_uuid(), gen_random_uuid(), coalesce(%s, gen_random_uuid()), 'u' || i, 'local',"
            " 'start', 'system', %s FROM generate_series(0, %s - 1) AS i",
            [product_id, queue, count],
        )
        connection.execute("ANALYZE operations")


def operations(database: Database, lease_s: float = 60) -> OperationStore:
    """The operations of a node, as one of its Provisioners sees them."""
    return OperationStore(
        database,
        owner=uuid4(),
        node="local",
        lease_s=lease_s,
        boot_timeout_s=60,
        ports=PortAllocator("local", range(0)),
        url_of=lambda engine_id, port: "",
        restarts=RestartPolicy(1, 1, 1),
        stale_ok_s=300,
    )


@pytest.fixture
def store(database: Database, database_url: str) -> OperationStore:
    """The operations of a node, with 40 of them waiting."""
    queue(database_url, 40)
    return operations(database, lease_s=0.1)


async def test_no_more_are_claimed_than_there_is_room_for(store: OperationStore) -> None:
    taken: set[UUID] = set()
    for _ in range(5):
        claimed = await store.claim({Queue.BOOT: 8}, taken)
        assert len(claimed) == 8
        taken |= {operation.operation_id for operation in claimed}
    assert len(taken) == 40


async def test_what_still_runs_here_is_not_taken_up_again_though_its_lease_ran_out(
    store: OperationStore, database_url: str
) -> None:
    running = {operation.operation_id for operation in await store.claim({Queue.BOOT: 40}, ())}
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE operations SET lease_until = clock_timestamp() - interval '1 s'")
    assert await store.claim({Queue.BOOT: 40}, running) == []
    assert len(await store.claim({Queue.BOOT: 40}, ())) == 40


async def test_what_a_later_version_has_written_is_left_to_it(store: OperationStore, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE operations SET kind = 'migrate' WHERE user_id LIKE 'u1%'")
        connection.execute("UPDATE operations SET step = 'packing' WHERE user_id LIKE 'u2%'")
    assert len(await store.claim({Queue.BOOT: 40}, ())) == 18


async def test_an_operation_that_nobody_could_carry_out_names_itself_to_those_who_wait(store: OperationStore) -> None:
    (operation,) = await store.claim({Queue.BOOT: 1}, ())
    await store.quarantine(operation)
    (settled,) = await store.settled([operation.operation_id])
    failure = settled.failure()
    assert failure is not None
    assert (failure.code, str(operation.operation_id) in failure.message) == ("INTERNAL", True)


@pytest.mark.parametrize("outcome", list(Outcome))
async def test_however_a_backup_ends_its_engine_stays(database: Database, database_url: str, outcome: Outcome) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO engines (engine_id, status, image, node, url, encrypted_key)"
            " VALUES (gen_random_uuid(), 'running', 'engine:1', 'local', 'http://127.0.0.1:1', '')"
        )
        connection.execute(
            "INSERT INTO operations (operation_id, engine_id, node, kind, actor, queue)"
            " SELECT gen_random_uuid(), engine_id, node, 'backup', 'operator', 'other' FROM engines"
        )
        store = operations(database)
        (operation,) = await store.claim({Queue.OTHER: 1}, ())
        await store.finish(operation, outcome)
        assert connection.execute("SELECT status FROM engines").fetchall() == [("running",)]


async def test_an_operation_that_was_open_for_months_gives_way_to_a_destroy(shared: Shared, clients: Clients) -> None:
    platform, _ = shared
    product = await clients.register()
    await clients.provisioner.ProvisionEngine(pb.ProvisionEngineRequest(user_id="ada"), metadata=product.metadata)
    platform.query(
        "INSERT INTO operations (operation_id, engine_id, product_id, user_id, node, kind, actor, quarantined_at,"
        " created_at) SELECT gen_random_uuid(), engine_id, product_id, user_id, node, 'stop', 'x', now(),"
        " now() - interval '100 days' FROM engines WHERE product_id = %s",
        product.product_id,
    )
    await clients.provisioner.DestroyEngine(pb.DestroyEngineRequest(user_id="ada"), metadata=product.metadata)


@pytest.fixture
def next_product(database_url: str) -> NextProduct:
    """Claims one boot; returns whose it is."""

    async def next_product(store: OperationStore) -> UUID | None:
        (operation,) = await store.claim({Queue.BOOT: 1}, ())
        with psycopg.connect(database_url) as connection:
            cursor = connection.execute(
                "SELECT product_id FROM operations WHERE operation_id = %s", [operation.operation_id]
            )
            product_id: UUID | None = cursor.fetchall()[0][0]
        return product_id

    return next_product


async def test_products_take_turns_whatever_one_of_them_has_queued(
    database: Database, database_url: str, next_product: NextProduct
) -> None:
    first, second = operations(database), operations(database)
    greedy, late, later = uuid4(), uuid4(), uuid4()
    queue(database_url, 500, greedy)
    assert len(await first.claim({Queue.BOOT: 2}, ())) == 2
    assert len(await second.claim({Queue.BOOT: 2}, ())) == 2
    queue(database_url, 1, late)
    queue(database_url, 6, later)
    order = [await next_product(store) for _ in range(5) for store in (first, second)]
    # One of each product, then as many as the greedy one has under way.
    assert order == [late, later, later, later, later, greedy, later, greedy, later, greedy]


async def test_members_of_the_warm_pool_are_booted_when_nobody_else_waits(
    database: Database, database_url: str, next_product: NextProduct
) -> None:
    store = operations(database)
    queue(database_url, 3)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE operations SET product_id = NULL, user_id = NULL")
    product = uuid4()
    queue(database_url, 3, product)
    order = [await next_product(store) for _ in range(6)]
    assert order == [product, product, product, None, None, None]


async def test_claims_at_the_same_time_share_what_waits(database: Database, database_url: str) -> None:
    product = uuid4()
    queue(database_url, 60, product)
    stores = [operations(database) for _ in range(6)]
    claims = await asyncio.gather(*(store.claim({Queue.BOOT: 2}, ()) for store in stores))
    taken = Counter(operation.operation_id for claim in claims for operation in claim)
    assert len(taken) == 12
    assert set(taken.values()) == {1}


async def test_each_queue_has_its_own_places(database: Database, database_url: str) -> None:
    store = operations(database)
    product = uuid4()
    for name in Queue:
        queue(database_url, 20, product, name)
    claimed = await store.claim({Queue.SLEEP: 3, Queue.OTHER: 5}, ())
    assert Counter(operation.queue for operation in claimed) == {Queue.SLEEP: 3, Queue.OTHER: 5}


async def test_only_what_starts_an_instance_waits_for_a_place_to_boot(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    platform = shared[0]

    async def call(verb: str) -> None:
        request = getattr(pb, f"{verb}EngineRequest")(user_id="u1")
        async with asyncio.timeout(20):
            while True:
                try:
                    await getattr(clients.provisioner, f"{verb}Engine")(request, metadata=product.metadata)
                    return
                except grpc.aio.AioRpcError as error:
                    if reason(error) != "UNAVAILABLE":
                        raise

    for verb in ("Provision", "Sleep", "Wake", "Stop", "Start", "Sleep"):
        await call(verb)
    platform.query("UPDATE engines SET deep_asleep = true WHERE product_id = %s", UUID(product.product_id))
    for verb in ("Wake", "Destroy"):
        await call(verb)
    queues = platform.query(
        "SELECT kind, queue FROM operations WHERE product_id = %s AND outcome = 'succeeded' ORDER BY created_at",
        UUID(product.product_id),
    )
    assert queues == [
        ("provision", "boot"),
        ("sleep", "sleep"),
        ("wake", "other"),
        ("stop", "other"),
        ("start", "boot"),
        ("sleep", "sleep"),
        ("wake", "boot"),
        ("destroy", "other"),
    ]


async def test_a_burst_of_one_product_does_not_hold_up_the_single_user_of_another(
    platform: Platform, connect: Connect
) -> None:
    settings = {"ORCH_BOOT_CONCURRENCY": "4", "ORCH_ENGINE_IMAGE": "tests.engines.slow_boot"}
    first, second = platform.provisioner(**settings), platform.provisioner(**settings)
    bursts, single = connect(platform, first), connect(platform, second)
    greedy, other = await bursts.register(max_engines=200), await bursts.register()

    def provision(clients: Clients, product: Product, user_id: str) -> "asyncio.Future[pb.ProvisionEngineResponse]":
        request = pb.ProvisionEngineRequest(user_id=user_id)
        return asyncio.ensure_future(clients.provisioner.ProvisionEngine(request, metadata=product.metadata))

    burst: list[asyncio.Future[pb.ProvisionEngineResponse]] = []
    for _ in range(8):
        burst += [provision(bursts, greedy, f"u{len(burst) + i}") for i in range(25)]
        written = "SELECT FROM operations HAVING count(*) = %s"
        await asyncio.to_thread(eventually, partial(platform.query, written, len(burst)), "they are queued")
    await provision(single, other, "u0")
    # The first claim sets the deadline, so that deadlines have the order in which boots began.
    (begun_before,) = platform.query(
        "SELECT count(*) FROM operations AS o, operations AS single WHERE o.product_id = %s AND single.product_id = %s"
        " AND o.deadline < single.deadline AND o.deadline > single.created_at + interval '60 s'",
        UUID(greedy.product_id),
        UUID(other.product_id),
    )
    (running,) = platform.query(
        "SELECT max(n) FROM (SELECT count(*) AS n FROM operations WHERE owner IS NOT NULL GROUP BY owner) AS owners"
    )
    assert begun_before[0] <= 8
    assert running[0] <= 4
    for call in burst:
        call.cancel()
    await asyncio.gather(*burst, return_exceptions=True)
