"""How long a refusal takes tells nothing of whether a key has ever been good, or of how much of it is right."""

import hashlib
import random
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Any
from uuid import UUID

import grpc
import pytest

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import fleet_service_pb2 as fleet_pb
from september.provisioner.v1 import product_service_pb2 as product_pb
from services.shared.keys import new_platform_key
from tests.harness import Clients, Platform, Service, reason

pytestmark = pytest.mark.early(45)

Shared = tuple[Platform, list[Service]]
Extent = Callable[[int, int], int]
Shown = list[tuple[str, str]]


def add_keys(platform: Platform, product_id: str, number: int, *, expired: bool) -> list[str]:
    """More keys of a product, each to be shown once."""
    keys = [new_platform_key() for _ in range(number)]
    platform.query(
        "INSERT INTO platform_keys (key_hash, product_id, expires_at)"
        " SELECT key_hash, %s, CASE WHEN %s THEN clock_timestamp() END FROM unnest(%s::bytea[]) AS key_hash",
        UUID(product_id),
        expired,
        [hashlib.sha256(key.encode()).digest() for key in keys],
    )
    return keys


async def refusals(
    call: Callable[[str, str], Any], shown: Shown
) -> tuple[dict[str, list[float]], set[tuple[str, str | None]]]:
    """How long the refusals of each kind of key took, sorted, and all that they said."""
    # So that whatever else this machine does disturbs all alike.
    random.shuffle(shown)
    times: defaultdict[str, list[float]] = defaultdict(list)
    errors = set()
    for kind, key in shown:
        # Each comes from elsewhere, or their wrong keys would be too many.
        address = str(IPv4Address(random.getrandbits(32)))
        began = time.perf_counter()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(key, address)
        times[kind].append(time.perf_counter() - began)
        errors.add((reason(error.value), error.value.details()))
    return {kind: sorted(taken) for kind, taken in times.items()}, errors


def check_alike(times: dict[str, list[float]], within: float) -> None:
    """Of two refusals, one of each kind, either takes longer as often as the other.

    Args:
        within: by how much that may be off for chance, which is as much on a busy machine as on a quiet one.
    """
    for one in times:
        for other in times:
            longer = sum(bisect(times[other], taken) for taken in times[one]) / len(times[one]) / len(times[other])
            assert abs(longer - 0.5) < within, (one, other, longer)


@pytest.mark.parametrize("service", ["admission", "provisioner"])
async def test_keys_that_never_were_good_and_that_no_longer_are_take_as_long(
    clients: Clients, shared: Shared, service: str, extent: Extent
) -> None:
    platform, _ = shared
    number = extent(300, 10_000)
    product, disabled = await clients.register(), await clients.register()
    platform.query("UPDATE products SET disabled_at = clock_timestamp() WHERE product_id = %s", disabled.product_id)
    shown = [("unknown", new_platform_key()) for _ in range(number)]
    shown += [("revoked", key) for key in add_keys(platform, product.product_id, number, expired=True)]
    shown += [("disabled", key) for key in add_keys(platform, disabled.product_id, number, expired=False)]

    def call(key: str, address: str) -> Any:
        metadata = (("x-platform-key", key), ("x-envoy-external-address", address))
        if service == "admission":
            return clients.admission.Admit(admission_pb.AdmitRequest(user_id="u1"), metadata=metadata)
        return clients.fleet.GetFleetStatus(fleet_pb.GetFleetStatusRequest(), metadata=metadata)

    times, errors = await refusals(call, shown)
    assert errors == {("INVALID_PLATFORM_KEY", "x-platform-key is missing or not a valid platform key")}
    check_alike(times, extent(100, 20) / 1000)


async def test_admin_keys_take_as_long_however_much_of_them_is_right(
    clients: Clients, shared: Shared, extent: Extent
) -> None:
    right = shared[0].admin_key
    shown = [
        (f"{length} right", right[:length] + "".join("-" if character != "-" else "_" for character in right[length:]))
        for length in (0, 16, 31)
        for _ in range(extent(300, 10_000))
    ]

    def call(key: str, address: str) -> Any:
        metadata = (("x-admin-key", key), ("x-envoy-external-address", address))
        return clients.products.ListProducts(product_pb.ListProductsRequest(), metadata=metadata)

    times, errors = await refusals(call, shown)
    assert [code for code, _ in errors] == ["INVALID_ADMIN_KEY"]
    check_alike(times, extent(100, 20) / 1000)
