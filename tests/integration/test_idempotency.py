"""Idempotency keys: the same call has the same answer and no second effect; whatever else has not."""

import asyncio
import random
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import grpc
import pytest
from cryptography.fernet import Fernet
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from september.provisioner.v1 import fleet_service_pb2 as fleet_pb
from september.provisioner.v1 import product_service_pb2 as product_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from services.provisioner.domain.idempotency import KeyedCall
from services.provisioner.servicers.idempotency import IN_TRANSACTION, THROUGH_OPERATION
from services.provisioner.store.idempotency import IdempotencyStore, begun_before
from services.shared.authorization import ROLES
from services.shared.errors import EngineNotFound
from services.shared.keys import EngineKeyring
from services.shared.postgres import Database
from tests.harness import Clients, Platform, Product, Service, eventually, reason

Shared = tuple[Platform, list[Service]]
Metadata = tuple[tuple[str, str], ...]

# What changes nothing, and what is idempotent by itself.
KEYLESS = {
    *("WatchEngine", "EnsureEngine", "ListEngines", "GetFleetStatus", "GetFleetMetrics", "ListAuditEvents"),
    *("GetEngineHistory", "ListProducts", "GetProduct", "Check", "Watch", "Admit", "GetEngine", "CheckHealth"),
}
ALLOWED = ["services.engine", "tests.engines.*"]


def keyed(metadata: Metadata, key: str) -> Metadata:
    return (*metadata, ("idempotency-key", key))


def new_key() -> str:
    return uuid4().hex


async def refused(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return reason(error.value)


def events(platform: Platform, product: Product) -> int:
    """How much has happened to the product and its engines."""
    (count,) = platform.query("SELECT count(*) FROM audit_events WHERE product_id = %s", product.product_id)
    return int(count[0])


def let_a_day_pass(platform: Platform) -> None:
    platform.query("UPDATE idempotency_keys SET begun_at = begun_at - interval '24 hours'")


def engine_call(clients: Clients, product: Product, method: str, user_id: str, key: str = "") -> Any:
    request = getattr(pb, f"{method}Request")(user_id=user_id)
    return getattr(clients.provisioner, method)(
        request, metadata=keyed(product.metadata, key) if key else product.metadata
    )


@dataclass(frozen=True)
class Case:
    """A method on an engine.

    Args:
        before: what is called before it.
        undo: what is called after it, so that it could be done again.
    """

    before: list[str]
    undo: str


ENGINES = {
    "ProvisionEngine": Case([], "DestroyEngine"),
    "DestroyEngine": Case(["ProvisionEngine"], "ProvisionEngine"),
    "StartEngine": Case(["ProvisionEngine", "StopEngine"], "StopEngine"),
    "StopEngine": Case(["ProvisionEngine"], "StartEngine"),
    "SleepEngine": Case(["ProvisionEngine"], "WakeEngine"),
    "WakeEngine": Case(["ProvisionEngine", "SleepEngine"], "SleepEngine"),
    "RotateEngineKey": Case(["ProvisionEngine"], "RotateEngineKey"),
}


def test_every_method_that_changes_something_takes_keys() -> None:
    methods = {*THROUGH_OPERATION, *IN_TRANSACTION}
    assert methods == {method for method in ROLES if method.rpartition("/")[2] not in KEYLESS}


@pytest.mark.parametrize("method", ENGINES)
async def test_a_repeated_call_on_an_engine_has_its_first_answer_and_no_effect(
    shared: Shared, clients: Clients, method: str
) -> None:
    platform, _ = shared
    case, key = ENGINES[method], new_key()
    product, other = [await clients.register() for _ in range(2)]
    for before in case.before:
        for owner in (product, other):
            await engine_call(clients, owner, before, "u1")

    first = await engine_call(clients, product, method, "u1", key)
    begun = events(platform, product)
    assert await engine_call(clients, product, method, "u1", key) == first
    assert await refused(engine_call(clients, product, method, "u2", key)) == "IDEMPOTENCY_CONFLICT"
    assert events(platform, product) == begun

    # Another caller's key is another key.
    await engine_call(clients, other, method, "u1", key)
    assert events(platform, other) == begun

    await engine_call(clients, product, case.undo, "u1")
    undone = events(platform, product)
    assert await engine_call(clients, product, method, "u1", key) == first
    assert events(platform, product) == undone

    let_a_day_pass(platform)
    again = await engine_call(clients, product, method, "u1", key)
    assert events(platform, product) > undone
    if method in ("ProvisionEngine", "RotateEngineKey"):
        assert again.api_key != first.api_key


def fields(**policy: Any) -> Struct:
    return ParseDict({"max_engines": 100, **policy}, Struct())


PRODUCTS: dict[str, tuple[Callable[[str], Any], Callable[[str], Any]]] = {
    "UpdatePolicy": (
        lambda product_id: product_pb.UpdatePolicyRequest(product_id=product_id, policy=fields(rate_limit_rpm=7)),
        lambda product_id: product_pb.UpdatePolicyRequest(product_id=product_id, policy=fields(rate_limit_rpm=8)),
    ),
    "RotatePlatformKey": (
        lambda product_id: product_pb.RotatePlatformKeyRequest(product_id=product_id, grace_s=60),
        lambda product_id: product_pb.RotatePlatformKeyRequest(product_id=product_id, grace_s=61),
    ),
    "DisableProduct": (
        lambda product_id: product_pb.DisableProductRequest(product_id=product_id),
        lambda product_id: product_pb.DisableProductRequest(product_id=str(uuid4())),
    ),
    "EnableProduct": (
        lambda product_id: product_pb.EnableProductRequest(product_id=product_id),
        lambda product_id: product_pb.EnableProductRequest(product_id=str(uuid4())),
    ),
}
OPPOSITES = {"DisableProduct": "EnableProduct", "EnableProduct": "DisableProduct"}


@pytest.mark.parametrize("method", PRODUCTS)
async def test_a_repeated_call_on_a_product_has_its_first_answer_and_no_effect(
    shared: Shared, clients: Clients, method: str
) -> None:
    platform, _ = shared
    product, key = await clients.register(), new_key()
    admin = keyed(clients.admin, key)
    stub = getattr(clients.products, method)
    request, other = (make(product.product_id) for make in PRODUCTS[method])
    if method == "EnableProduct":
        await clients.products.DisableProduct(PRODUCTS["DisableProduct"][0](product.product_id), metadata=clients.admin)

    first = await stub(request, metadata=admin)
    begun = events(platform, product)
    assert await stub(request, metadata=admin) == first
    assert await refused(stub(other, metadata=admin)) == "IDEMPOTENCY_CONFLICT"
    assert events(platform, product) == begun

    undo = OPPOSITES.get(method, method)
    await getattr(clients.products, undo)(PRODUCTS[undo][0](product.product_id), metadata=clients.admin)
    undone = events(platform, product)
    assert await stub(request, metadata=admin) == first
    assert events(platform, product) == undone

    let_a_day_pass(platform)
    again = await stub(request, metadata=admin)
    assert events(platform, product) == undone + 1
    if method == "RotatePlatformKey":
        assert again.platform_api_key != first.platform_api_key


async def test_a_repeated_registration_shows_the_same_key_for_a_day(shared: Shared, clients: Clients) -> None:
    platform, _ = shared
    key = new_key()
    policy = {"max_engines": 3, "rate_limit_rpm": 60, "idle_sleep_after_s": 60}

    def register(slug: str) -> Any:
        # The order of fields says nothing.
        request = product_pb.RegisterProductRequest(slug=slug)
        for name in random.sample(sorted(policy), len(policy)):
            request.policy[name] = policy[name]
        return clients.products.RegisterProduct(request, metadata=keyed(clients.admin, key))

    slug = f"p{uuid4().hex[:20]}"
    first = await register(slug)
    for _ in range(5):
        assert await register(slug) == first
    assert await refused(register("other")) == "IDEMPOTENCY_CONFLICT"
    product = Product(first.product_id, slug, first.platform_api_key)
    await clients.fleet.GetFleetStatus(fleet_pb.GetFleetStatusRequest(), metadata=product.metadata)
    let_a_day_pass(platform)
    assert await refused(register(slug)) == "PRODUCT_SLUG_EXISTS"


async def test_a_key_stands_for_one_method(clients: Clients) -> None:
    product, key = await clients.register(), new_key()
    await engine_call(clients, product, "ProvisionEngine", "u1", key)
    assert await refused(engine_call(clients, product, "DestroyEngine", "u1", key)) == "IDEMPOTENCY_CONFLICT"


async def test_an_operators_key_is_not_a_products(clients: Clients) -> None:
    key = new_key()
    product = await clients.register()
    request = product_pb.RotatePlatformKeyRequest(product_id=product.product_id, grace_s=60)
    await clients.products.RotatePlatformKey(request, metadata=keyed(clients.admin, key))
    await engine_call(clients, product, "ProvisionEngine", "u1", key)


async def test_a_product_whose_key_was_rotated_is_the_same_caller(clients: Clients) -> None:
    product, key = await clients.register(), new_key()
    first = await engine_call(clients, product, "ProvisionEngine", "u1", key)
    request = product_pb.RotatePlatformKeyRequest(product_id=product.product_id, grace_s=0)
    rotated = await clients.products.RotatePlatformKey(request, metadata=clients.admin)
    assert await refused(engine_call(clients, product, "ProvisionEngine", "u1", key)) == "INVALID_PLATFORM_KEY"
    product = Product(product.product_id, product.slug, rotated.platform_api_key)
    assert await engine_call(clients, product, "ProvisionEngine", "u1", key) == first


async def test_a_refused_call_leaves_its_key_free(clients: Clients) -> None:
    product, key = await clients.register(max_engines=0), new_key()
    assert await refused(engine_call(clients, product, "StopEngine", "u1", key)) == "ENGINE_NOT_FOUND"
    assert await refused(engine_call(clients, product, "ProvisionEngine", "u1", key)) == "QUOTA_EXCEEDED"
    missing = product_pb.DisableProductRequest(product_id=str(uuid4()))
    admin = keyed(clients.admin, key)
    assert await refused(clients.products.DisableProduct(missing, metadata=admin)) == "PRODUCT_NOT_FOUND"

    request = product_pb.UpdatePolicyRequest(product_id=product.product_id, policy=fields(max_engines=1))
    await clients.products.UpdatePolicy(request, metadata=admin)
    await engine_call(clients, product, "ProvisionEngine", "u1", key)


async def test_a_boot_that_failed_is_tried_again_with_its_key(shared: Shared, clients: Clients) -> None:
    platform, _ = shared
    product, key = await clients.register(allowed_images=ALLOWED), new_key()
    for attempt in (1, 2):
        request = pb.ProvisionEngineRequest(user_id="u1", engine_version="tests.engines.exits")
        call = clients.provisioner.ProvisionEngine(request, metadata=keyed(product.metadata, key))
        assert await refused(call) == "BACKEND_ERROR"
        boots = platform.query("SELECT 1 FROM operations WHERE product_id = %s", product.product_id)
        assert len(boots) == attempt


async def test_a_destroy_that_a_boot_gives_way_to_is_answered_once_and_for_all(
    shared: Shared, clients: Clients
) -> None:
    platform, _ = shared
    product, key = await clients.register(allowed_images=ALLOWED), new_key()
    request = pb.ProvisionEngineRequest(user_id="u1", engine_version="tests.engines.never_healthy")
    boot = asyncio.ensure_future(clients.provisioner.ProvisionEngine(request, metadata=product.metadata))
    probing = "SELECT 1 FROM operations WHERE product_id = %s AND step = 'probing'"
    await asyncio.to_thread(eventually, lambda: platform.query(probing, product.product_id), "the engine boots")
    first = await engine_call(clients, product, "DestroyEngine", "u1", key)
    assert await refused(boot) == "UNAVAILABLE"
    assert await engine_call(clients, product, "DestroyEngine", "u1", key) == first


@pytest.mark.parametrize("keys", [[""], ["k" * 256], ["one", "one"], ["one", "two"]], ids=repr)
async def test_a_key_that_can_not_be_is_refused_by_name(clients: Clients, keys: list[str]) -> None:
    product = await clients.register()
    metadata = (*product.metadata, *(("idempotency-key", key) for key in keys))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await clients.provisioner.ProvisionEngine(pb.ProvisionEngineRequest(user_id="u1"), metadata=metadata)
    assert reason(error.value) == "INVALID_REQUEST"
    assert str(error.value.details()).startswith("idempotency-key: ")


async def test_any_printable_key_is_taken(clients: Clients) -> None:
    product = await clients.register()
    for key in ("!", "~ a 'key' \\ with; \"everything\" %s", "k" * 255):
        assert await refused(engine_call(clients, product, "StopEngine", "u1", key)) == "ENGINE_NOT_FOUND"


async def test_a_call_without_its_callers_key_learns_nothing(clients: Clients) -> None:
    product, key = await clients.register(), new_key()
    await engine_call(clients, product, "ProvisionEngine", "u1", key)
    stranger = Product(product.product_id, product.slug, "pk-sept-" + "x" * 43)
    for user_id in ("u1", "u2"):
        assert await refused(engine_call(clients, stranger, "ProvisionEngine", user_id, key)) == "INVALID_PLATFORM_KEY"


async def test_kept_answers_can_not_be_read_or_moved(shared: Shared, clients: Clients) -> None:
    platform, _ = shared
    keys = [new_key(), new_key()]
    slugs = [f"p{uuid4().hex[:20]}" for _ in keys]

    async def register(slug: str, key: str) -> Any:
        request = product_pb.RegisterProductRequest(slug=slug, policy=fields())
        return await clients.products.RegisterProduct(request, metadata=keyed(clients.admin, key))

    platform.query("DELETE FROM idempotency_keys")
    answers = [await register(slug, key) for slug, key in zip(slugs, keys, strict=True)]
    tokens = [token for (token,) in platform.query("SELECT answer FROM idempotency_keys")]
    kept = b"".join(tokens) + b"".join(urlsafe_b64decode(token) for token in tokens)
    for answer in answers:
        for shown in (answer.platform_api_key, answer.slug, answer.product_id):
            assert shown.encode() not in kept

    platform.query("UPDATE idempotency_keys a SET answer = b.answer FROM idempotency_keys b WHERE a.key_id <> b.key_id")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await register(slugs[0], keys[0])
    assert reason(error.value) == "INTERNAL"


@pytest.fixture
async def database(shared: Shared) -> AsyncIterator[Database]:
    database = Database(shared[0].database_url, application_name="test")
    await database.open()
    yield database
    await database.close()


@pytest.fixture
def store(database: Database) -> IdempotencyStore:
    return IdempotencyStore(database, EngineKeyring([Fernet.generate_key().decode()]))


@pytest.mark.parametrize("gone", [False, True], ids=["answered", "gone"])
async def test_of_two_at_once_the_second_has_the_answer_of_the_first(
    database: Database, store: IdempotencyStore, gone: bool
) -> None:
    call = KeyedCall.of(None, [new_key()], "method", b"")

    async def first() -> bytes:
        async with database.transaction() as tx:
            assert await begun_before(tx) is None
        return b"first"

    async def second() -> bytes:
        # What the first has answered, this one was just about to see; by now it may be gone.
        assert await store.through_operation(call, first) == b"first"
        if gone:
            raise EngineNotFound
        return b"second"

    assert await store.through_operation(call, second) == b"first"


async def test_housekeeping_deletes_what_is_over_and_no_more(shared: Shared, store: IdempotencyStore) -> None:
    platform, _ = shared
    platform.query(
        "INSERT INTO idempotency_keys (key_id, request_hash, begun_at)"
        " SELECT gen_random_uuid(), decode(repeat('00', 32), 'hex'), clock_timestamp() - make_interval(hours => hours)"
        " FROM unnest(ARRAY[23, 24]) AS hours, generate_series(1, 2500)"
    )
    await store.drop_expired()
    left = "SELECT count(*) FILTER (WHERE begun_at < clock_timestamp() - interval '{} hours') FROM idempotency_keys"
    assert platform.query(left.format(24)) == [(0,)]
    assert platform.query(left.format(22))[0][0] == 2500
