"""This version beside a later one on one registry: it leaves alone what it does not know, and goes on with the rest."""

from collections.abc import Callable
from uuid import UUID

import grpc
import pytest

from tests.harness import Clients, Platform, reason, retry_after_s
from tests.integration.test_life_cycle import User

Connect = Callable[..., Clients]
QUICK = {
    "ORCH_HEALTH_CHECK_INTERVAL_S": "1",
    "ORCH_RECONCILE_INTERVAL_S": "1",
    "ORCH_SLEEP_CHECK_INTERVAL_S": "0.2",
    "ORCH_WARM_POOL_SIZE": "1",
}


async def test_columns_and_statuses_of_a_later_version_disturb_nobody_else(
    platform: Platform, connect: Connect
) -> None:
    provisioner = platform.provisioner(**QUICK)
    admission = platform.admission(provisioner)
    clients = connect(platform, provisioner, admission)
    product = await clients.register()
    other, user = User(clients, product, "other"), User(clients, product, "u1")
    made = (await other.admit(auto_provision=True)).engine
    for table in ("engines", "operations", "products", "loop_leases", "audit_events", "engine_activity"):
        platform.query(f"ALTER TABLE {table} ADD COLUMN later text DEFAULT 'new'")
    platform.query("ALTER TABLE engines DROP CONSTRAINT engines_status_check")
    platform.query("UPDATE engines SET status = 'hibernating' WHERE engine_id = %s", UUID(made.engine_id))
    platform.replicas_know()

    refused = []
    for call in (other.admit(auto_wake=True), other.call("Stop"), other.call("Destroy")):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        refused.append((reason(error.value), retry_after_s(error.value) > 0))
    assert refused == [("UNAVAILABLE", True)] * 3
    await user.admit(auto_provision=True)
    await user.call("Stop")
    await user.call("Start")
    assert (await user.admit()).admitted
    await user.call("Destroy")
    assert platform.query("SELECT status FROM engines WHERE product_id IS NOT NULL") == [("hibernating",)]
    failures = ("call_failed", "engine_skipped", "probe_failed", "operation_failed", "boot_failed")
    logged = [event["event"] for service in (provisioner, admission) for event in service.events()]
    assert not set(logged) & set(failures)
