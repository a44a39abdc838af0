"""Products as operators handle them: lists, keys with an overlap, disabling; seen from both services."""

import asyncio
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import fleet_service_pb2 as fleet_pb
from september.provisioner.v1 import product_service_pb2 as pb
from tests.harness import Clients, Platform, Product, Service, reason

Shared = tuple[Platform, list[Service]]


async def refused(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return f"{reason(error.value)}: {error.value.details()}"


async def rotate(clients: Clients, product: Product, grace_s: int) -> Product:
    """The product with its new key."""
    request = pb.RotatePlatformKeyRequest(product_id=product.product_id, grace_s=grace_s)
    answer = await clients.products.RotatePlatformKey(request, metadata=clients.admin)
    return Product(product.product_id, product.slug, answer.platform_api_key)


async def takes(clients: Clients, product: Product) -> list[bool]:
    """Whether the Provisioner and Admission take the product's key."""
    calls = (
        clients.fleet.GetFleetStatus(fleet_pb.GetFleetStatusRequest(), metadata=product.metadata),
        clients.admission.Admit(admission_pb.AdmitRequest(user_id="nobody"), metadata=product.metadata),
    )
    return [await accepted(call) for call in calls]


async def accepted(call: Any) -> bool:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if reason(error) != "INVALID_PLATFORM_KEY":
            raise
        return False
    return True


async def takes_at_last(clients: Clients, product: Product, wanted: bool) -> None:
    """Asks until both services take the key or not; Admission may know a little later."""
    end = time.monotonic() + 10
    while await takes(clients, product) != [wanted, wanted]:
        assert time.monotonic() < end, f"the key is taken by both: {wanted}"


def actions(platform: Platform, product: Product) -> list[tuple[str, str]]:
    events = platform.query(
        "SELECT action, actor FROM audit_events WHERE product_id = %s ORDER BY event_id", UUID(product.product_id)
    )
    return [(action, actor) for action, actor in events]


async def test_a_registered_product_is_found_with_its_whole_policy(clients: Clients) -> None:
    policy = {
        "max_engines": 7,
        "rate_limit_rpm": 60,
        "allowed_images": ["a:*"],
        "idle_sleep_after_s": 900,
        "max_keep_awake_s": 0,
    }
    product = await clients.register(**policy)
    found = (
        await clients.products.GetProduct(pb.GetProductRequest(product_id=product.product_id), metadata=clients.admin)
    ).product
    assert (found.product_id, found.slug) == (product.product_id, product.slug)
    assert {name: getattr(found.policy, name) for name in policy} == policy
    assert found.HasField("created_at")
    assert not found.HasField("disabled_at")


async def test_an_updated_policy_is_replaced_as_a_whole(clients: Clients) -> None:
    product = await clients.register(max_engines=7, rate_limit_rpm=60, idle_sleep_after_s=900, max_keep_awake_s=5)
    request = pb.UpdatePolicyRequest(product_id=product.product_id)
    request.policy.update({"max_engines": 8})
    answer = await clients.products.UpdatePolicy(request, metadata=clients.admin)
    found = await clients.products.GetProduct(
        pb.GetProductRequest(product_id=product.product_id), metadata=clients.admin
    )
    assert answer.policy == found.product.policy
    assert (answer.policy.max_engines, answer.policy.max_keep_awake_s) == (8, 3600)
    assert not answer.policy.HasField("rate_limit_rpm")
    assert not answer.policy.HasField("idle_sleep_after_s")


async def test_pages_hold_every_product_once_by_slug(clients: Clients) -> None:
    registered = {(await clients.register()).slug for _ in range(5)}
    seen: list[str] = []
    token = ""
    while True:
        page = await clients.products.ListProducts(
            pb.ListProductsRequest(limit=2, page_token=token), metadata=clients.admin
        )
        seen += [product.slug for product in page.products]
        if not page.HasField("next_page_token"):
            break
        assert len(page.products) == 2
        token = page.next_page_token
    assert registered <= set(seen)
    assert len(seen) == len(set(seen))
    whole = await clients.products.ListProducts(pb.ListProductsRequest(limit=1000), metadata=clients.admin)
    assert [product.slug for product in whole.products] == seen


async def test_a_rotated_key_is_taken_beside_the_new_one_until_its_grace_is_over(
    clients: Clients, shared: Shared
) -> None:
    old = await clients.register()
    new = await rotate(clients, old, grace_s=3600)
    assert new.key != old.key
    await takes_at_last(clients, new, True)
    await takes_at_last(clients, old, True)
    # The hour goes by.
    shared[0].query(
        "UPDATE platform_keys SET expires_at = expires_at - interval '1 h' WHERE product_id = %s", UUID(old.product_id)
    )
    await takes_at_last(clients, old, False)
    await takes_at_last(clients, new, True)
    assert actions(shared[0], old) == [("policy_register", "admin"), ("key_rotate", "admin")]


async def test_without_grace_the_old_keys_end_at_once_those_in_their_grace_too(clients: Clients) -> None:
    first = await clients.register()
    second = await rotate(clients, first, grace_s=604_800)
    third = await rotate(clients, second, grace_s=0)
    await takes_at_last(clients, first, False)
    await takes_at_last(clients, second, False)
    await takes_at_last(clients, third, True)


async def test_a_second_rotation_never_gives_an_old_key_more_time(clients: Clients, shared: Shared) -> None:
    first = await clients.register()
    second = await rotate(clients, first, grace_s=60)
    await rotate(clients, second, grace_s=604_800)
    ends = shared[0].query(
        "SELECT extract(epoch FROM expires_at - clock_timestamp()) FROM platform_keys"
        " WHERE product_id = %s AND expires_at IS NOT NULL ORDER BY expires_at",
        UUID(first.product_id),
    )
    assert [round(float(seconds), -2) for (seconds,) in ends] == [100, 604_800]


async def test_of_keys_made_at_once_one_goes_on(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    made = await asyncio.gather(*(rotate(clients, product, grace_s=0) for _ in range(8)))
    taken = [await takes(clients, one) for one in (product, *made)]
    assert taken.count([True, True]) == 1
    assert taken.count([False, False]) == 8


async def test_a_disabled_products_keys_are_refused_as_unknown_ones_are(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    disable = pb.DisableProductRequest(product_id=product.product_id)
    first = await clients.products.DisableProduct(disable, metadata=clients.admin)
    again = await clients.products.DisableProduct(disable, metadata=clients.admin)
    assert first.product.HasField("disabled_at")
    assert first == again
    await takes_at_last(clients, product, False)
    unknown = Product(product.product_id, product.slug, f"pk-sept-{'A' * 43}")
    for stub, request in (
        (clients.fleet.GetFleetStatus, fleet_pb.GetFleetStatusRequest()),
        (clients.admission.Admit, admission_pb.AdmitRequest(user_id="u1")),
    ):
        call: Callable[..., Any] = stub
        answers = [await refused(call(request, metadata=one.metadata)) for one in (product, unknown)]
        assert answers[0] == answers[1]

    enable = pb.EnableProductRequest(product_id=product.product_id)
    enabled = await clients.products.EnableProduct(enable, metadata=clients.admin)
    assert not enabled.product.HasField("disabled_at")
    await clients.products.EnableProduct(enable, metadata=clients.admin)
    await takes_at_last(clients, product, True)
    assert [action for action, _ in actions(shared[0], product)] == [
        "policy_register",
        "product_disable",
        "product_enable",
    ]


async def test_a_key_may_be_rotated_while_its_product_is_disabled(clients: Clients) -> None:
    product = await clients.register()
    await clients.products.DisableProduct(
        pb.DisableProductRequest(product_id=product.product_id), metadata=clients.admin
    )
    new = await rotate(clients, product, grace_s=0)
    await takes_at_last(clients, new, False)
    await clients.products.EnableProduct(pb.EnableProductRequest(product_id=product.product_id), metadata=clients.admin)
    await takes_at_last(clients, new, True)
    await takes_at_last(clients, product, False)


@pytest.mark.parametrize(
    ("method", "request_", "answer"),
    [
        ("ListProducts", pb.ListProductsRequest(limit=0), "INVALID_REQUEST: limit: "),
        ("ListProducts", pb.ListProductsRequest(limit=1001), "INVALID_REQUEST: limit: "),
        ("ListProducts", pb.ListProductsRequest(limit=-1), "INVALID_REQUEST: limit: "),
        ("ListProducts", pb.ListProductsRequest(page_token="!"), "INVALID_REQUEST: page_token: "),
        ("ListProducts", pb.ListProductsRequest(page_token="ZGVtbx"), "INVALID_REQUEST: page_token: "),
        ("ListProducts", pb.ListProductsRequest(page_token="RGVtbw"), "INVALID_REQUEST: page_token: "),
        ("ListProducts", pb.ListProductsRequest(page_token="é"), "INVALID_REQUEST: page_token: "),
        (
            "RotatePlatformKey",
            pb.RotatePlatformKeyRequest(product_id=str(uuid4()), grace_s=-1),
            "INVALID_REQUEST: grace_s: ",
        ),
        (
            "RotatePlatformKey",
            pb.RotatePlatformKeyRequest(product_id=str(uuid4()), grace_s=604_801),
            "INVALID_REQUEST: grace_s: ",
        ),
        ("GetProduct", pb.GetProductRequest(product_id="x"), "INVALID_REQUEST: product_id: "),
        ("RotatePlatformKey", pb.RotatePlatformKeyRequest(product_id="x"), "INVALID_REQUEST: product_id: "),
        ("DisableProduct", pb.DisableProductRequest(product_id="x"), "INVALID_REQUEST: product_id: "),
        ("EnableProduct", pb.EnableProductRequest(product_id="x"), "INVALID_REQUEST: product_id: "),
        ("GetProduct", pb.GetProductRequest(product_id=str(uuid4())), "PRODUCT_NOT_FOUND: "),
        ("RotatePlatformKey", pb.RotatePlatformKeyRequest(product_id=str(uuid4())), "PRODUCT_NOT_FOUND: "),
        ("DisableProduct", pb.DisableProductRequest(product_id=str(uuid4())), "PRODUCT_NOT_FOUND: "),
        ("EnableProduct", pb.EnableProductRequest(product_id=str(uuid4())), "PRODUCT_NOT_FOUND: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_call_is_refused_by_name(clients: Clients, method: str, request_: Any, answer: str) -> None:
    call = getattr(clients.products, method)(request_, metadata=clients.admin)
    assert (await refused(call)).startswith(answer)
