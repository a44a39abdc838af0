"""Idempotency keys over REST, through the real gateway."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.e2e.gateway_process import Answer, Gateway, running_gateway
from tests.harness import Clients, Platform, Product, Service


@pytest.fixture
async def gateway(shared: tuple[Platform, list[Service]], tmp_path: Path) -> AsyncIterator[Gateway]:
    _, (provisioner, admission, _) = shared
    async with running_gateway(tmp_path, admission.address, provisioner.address) as gateway:
        yield gateway


def error(answer: Answer) -> tuple[int, Any]:
    return answer.status, answer.json()["error"]


async def provision(gateway: Gateway, product: Product, user_id: str, *keys: str) -> Answer:
    headers = [("X-Platform-Key", product.key), *(("Idempotency-Key", key) for key in keys)]
    return await gateway.rest("POST", "/engines/provision", json.dumps({"user_id": user_id}).encode(), headers)


async def test_a_call_repeated_with_its_key_has_the_same_answer(gateway: Gateway, clients: Clients) -> None:
    product, key = await clients.register(), uuid4().hex
    first = await provision(gateway, product, "u1", key)
    again = await provision(gateway, product, "u1", key)
    assert (first.status, again.status) == (200, 200)
    assert again.body == first.body
    assert error(await provision(gateway, product, "u1", uuid4().hex))[1]["code"] == "ENGINE_ALREADY_EXISTS"
    assert error(await provision(gateway, product, "u2", key)) == (
        409,
        {"code": "IDEMPOTENCY_CONFLICT", "message": "idempotency-key: another request was made with it"},
    )

    headers = [("X-Platform-Key", product.key), ("Idempotency-Key", uuid4().hex)]
    destroyed = [await gateway.rest("DELETE", "/engines/u1", headers=headers) for _ in range(2)]
    assert [answer.json()["status"] for answer in destroyed] == ["destroyed"] * 2


async def test_a_product_registered_twice_with_a_key_has_one_platform_key(
    gateway: Gateway, shared: tuple[Platform, list[Service]]
) -> None:
    headers = [("X-Admin-Key", shared[0].admin_key), ("Idempotency-Key", uuid4().hex)]
    slug = f"p{uuid4().hex[:20]}"
    # The same, however it is written.
    bodies = [
        f'{{"slug":"{slug}","policy":{{"max_engines":2,"rate_limit_rpm":60}}}}',
        f'{{ "policy" : {{"rate_limit_rpm":60.0, "max_engines":2}}, "slug":"{slug}" }}',
    ]
    first, again = [await gateway.rest("POST", "/products/register", body.encode(), headers) for body in bodies]
    assert first.status == 200
    assert again.body == first.body


@pytest.mark.parametrize("keys", [[""], ["k" * 256], ["one", "two"], ["one", "one"], ["clé"]], ids=ascii)
async def test_a_key_that_can_not_be_is_refused_by_name(gateway: Gateway, clients: Clients, keys: list[str]) -> None:
    product = await clients.register()
    status, refused = error(await provision(gateway, product, "u1", *keys))
    assert (status, refused["code"]) == (400, "INVALID_REQUEST")
    assert refused["message"].startswith("idempotency-key: ")
