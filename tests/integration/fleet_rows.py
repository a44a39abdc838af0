"""Rows of a fleet without its engines, and calls that are refused."""

from typing import Any
from uuid import UUID

import grpc
import pytest

from tests.harness import Platform, Product, reason


def add_engines(platform: Platform, product: Product, *user_ids: str, status: str = "running") -> None:
    """Rows alone, of a node that nobody runs, so that no loop looks for their instances."""
    platform.query(
        "INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key)"
        " SELECT gen_random_uuid(), %s, user_id, %s, 'engine:1', 'elsewhere', 'http://127.0.0.1:1', ''"
        " FROM unnest(%s::text[]) AS user_id",
        UUID(product.product_id),
        status,
        list(user_ids),
    )


def add_event(
    platform: Platform,
    product: Product,
    action: str,
    outcome: str = "succeeded",
    *,
    minutes_ago: int = 0,
    user_id: str | None = None,
    duration_ms: int | None = None,
) -> None:
    platform.query(
        "INSERT INTO audit_events (at, action, actor, outcome, product_id, user_id, duration_ms)"
        " VALUES (clock_timestamp() - make_interval(mins => %s), %s, 'system', %s, %s, %s, %s)",
        minutes_ago,
        action,
        outcome,
        UUID(product.product_id),
        user_id,
        duration_ms,
    )


async def refused(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return f"{reason(error.value)}: {error.value.details()}"
