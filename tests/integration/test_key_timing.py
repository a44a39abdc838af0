"""How long a refusal takes tells nothing of whether a key has ever been good."""

import hashlib
import random
import time
from collections import defaultdict
from statistics import median
from typing import Any
from uuid import UUID

import grpc
import pytest

from september.admission.v1 import admission_service_pb2 as admission_pb
from september.provisioner.v1 import fleet_service_pb2 as fleet_pb
from services.shared.keys import new_platform_key
from tests.harness import Clients, Platform, Service, reason

Shared = tuple[Platform, list[Service]]
SAMPLES = 300
# Of the times of one class, how many are over the median of another: half, but for chance and noise.
LIKE = (0.3, 0.7)


def add_keys(platform: Platform, product_id: str, *, expired: bool) -> list[str]:
    """More keys of a product, each to be shown once."""
    keys = [new_platform_key() for _ in range(SAMPLES)]
    platform.query(
        "INSERT INTO platform_keys (key_hash, product_id, expires_at)"
        " SELECT key_hash, %s, CASE WHEN %s THEN clock_timestamp() END FROM unnest(%s::bytea[]) AS key_hash",
        UUID(product_id),
        expired,
        [hashlib.sha256(key.encode()).digest() for key in keys],
    )
    return keys


@pytest.mark.parametrize("service", ["admission", "provisioner"])
async def test_keys_that_never_were_good_and_that_no_longer_are_take_as_long(
    clients: Clients, shared: Shared, service: str
) -> None:
    platform, _ = shared
    product, disabled = await clients.register(), await clients.register()
    platform.query("UPDATE products SET disabled_at = clock_timestamp() WHERE product_id = %s", disabled.product_id)
    shown = [("unknown", new_platform_key()) for _ in range(SAMPLES)]
    shown += [("revoked", key) for key in add_keys(platform, product.product_id, expired=True)]
    shown += [("disabled", key) for key in add_keys(platform, disabled.product_id, expired=False)]
    # So that whatever else this machine does disturbs all alike.
    random.shuffle(shown)

    times: defaultdict[str, list[float]] = defaultdict(list)
    errors = set()
    for kind, key in shown:
        began = time.perf_counter()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask(clients, service, key)
        times[kind].append(time.perf_counter() - began)
        errors.add((reason(error.value), error.value.details()))
    assert errors == {("INVALID_PLATFORM_KEY", "x-platform-key is missing or not a valid platform key")}
    for one in times:
        for other in times:
            over = sum(taken > median(times[other]) for taken in times[one]) / SAMPLES
            assert LIKE[0] < over < LIKE[1], (one, other)


def ask(clients: Clients, service: str, key: str) -> Any:
    metadata = (("x-platform-key", key),)
    if service == "admission":
        return clients.admission.Admit(admission_pb.AdmitRequest(user_id="u1"), metadata=metadata)
    return clients.fleet.GetFleetStatus(fleet_pb.GetFleetStatusRequest(), metadata=metadata)
