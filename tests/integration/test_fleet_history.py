"""What happened: to one engine, and to all, as the audit log has it."""

from typing import Any
from uuid import UUID, uuid4

from september.engine.v1 import engine_pb2
from september.provisioner.v1 import fleet_pb2
from september.provisioner.v1 import fleet_service_pb2 as pb
from september.provisioner.v1 import provisioner_service_pb2 as provisioner_pb
from tests.harness import Clients, Platform, Service
from tests.integration.fleet_rows import add_event, refused

Shared = tuple[Platform, list[Service]]
Metadata = tuple[tuple[str, str], ...]


async def test_the_history_tells_of_the_engine_and_of_those_before_it(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    actor = f"product:{product.slug}"

    async def history(**request: Any) -> pb.GetEngineHistoryResponse:
        return await clients.fleet.GetEngineHistory(
            pb.GetEngineHistoryRequest(user_id="u1", **request), metadata=product.metadata
        )

    stub = clients.provisioner
    await stub.ProvisionEngine(provisioner_pb.ProvisionEngineRequest(user_id="u1"), metadata=product.metadata)
    await stub.DestroyEngine(provisioner_pb.DestroyEngineRequest(user_id="u1"), metadata=product.metadata)
    assert await refused(history()) == "ENGINE_NOT_FOUND: no engine for this user_id"
    made = await stub.ProvisionEngine(provisioner_pb.ProvisionEngineRequest(user_id="u1"), metadata=product.metadata)
    shared[0].query(
        "INSERT INTO engine_activity VALUES (%s, '2030-01-02 03:04:05Z', clock_timestamp() + interval '1 h')",
        UUID(made.engine_id),
    )
    running = await history()
    assert running.status == engine_pb2.Engine.Status.running
    assert running.summary.startswith(
        f"running since {running.since.ToJsonString()[:19]}Z; last admit 2030-01-02T03:04:05Z; kept"
    )
    assert running.last_admit_at.ToJsonString() == "2030-01-02T03:04:05Z"
    assert running.HasField("keep_awake_until")
    assert [(event.action, event.outcome) for event in running.events] == [
        (action, outcome) for action in ("provision", "destroy", "provision") for outcome in ("succeeded", "requested")
    ]
    assert {event.actor for event in running.events} == {actor}
    assert len({event.engine_id for event in running.events}) == 2
    assert [event.HasField("duration_ms") for event in running.events] == [True, False] * 3

    shared[0].query(
        "UPDATE engine_activity SET keep_awake_until = clock_timestamp() WHERE engine_id = %s", UUID(made.engine_id)
    )
    await stub.StopEngine(provisioner_pb.StopEngineRequest(user_id="u1"), metadata=product.metadata)
    stopped = await history(limit=1)
    assert stopped.summary.startswith(f"stopped since {stopped.since.ToJsonString()[:19]}Z by {actor}; last admit ")
    assert not stopped.HasField("keep_awake_until")
    assert [event.action for event in stopped.events] == ["stop"]


async def audit(clients: Clients, metadata: Metadata, **request: Any) -> pb.ListAuditEventsResponse:
    return await clients.fleet.ListAuditEvents(pb.ListAuditEventsRequest(**request), metadata=metadata)


async def test_audit_events_come_latest_first_and_by_pages(clients: Clients, shared: Shared) -> None:
    product, other = await clients.register(), await clients.register()
    for i in range(10):
        add_event(shared[0], product, "start" if i % 2 else "stop", user_id=f"u{i % 3}")
        add_event(shared[0], other, "start", user_id="u1")
    events: list[fleet_pb2.AuditEvent] = []
    token = ""
    while True:
        page = await audit(clients, product.metadata, limit=4, page_token=token)
        events += page.events
        # The latest come before the first page, and so on no later one.
        add_event(shared[0], product, "wake")
        if not page.HasField("next_page_token"):
            break
        token = page.next_page_token
    ids = [int(event.event_id) for event in events]
    assert ids == sorted(ids, reverse=True)
    assert [event.action for event in events] == ["start", "stop"] * 5 + ["policy_register"]
    assert {event.product_id for event in events} == {product.product_id}
    assert (events[0].actor, events[0].outcome, events[0].user_id) == ("system", "succeeded", "u0")


async def test_audit_events_are_narrowed_by_action_user_and_product(clients: Clients, shared: Shared) -> None:
    product, other = await clients.register(), await clients.register()
    for whose in (product, other):
        for action in ("start", "stop", "start"):
            add_event(shared[0], whose, action, user_id="u1")
        add_event(shared[0], whose, "start", user_id="u2")

    async def found(metadata: Metadata, **request: Any) -> list[tuple[str, str, str]]:
        page = await audit(clients, metadata, **request)
        return [(e.product_id, e.action, e.user_id) for e in page.events]

    ours, theirs = product.product_id, other.product_id
    assert len(await found(product.metadata)) == 5
    assert await found(product.metadata, action="stop") == [(ours, "stop", "u1")]
    assert await found(product.metadata, user_id="u2") == [(ours, "start", "u2")]
    assert await found(product.metadata, user_id="u1", action="start") == [(ours, "start", "u1")] * 2
    assert await found(product.metadata, user_id="nobody") == []
    assert await found(clients.admin, product_id=theirs, user_id="u2") == [(theirs, "start", "u2")]
    assert await found(clients.admin, product_id=theirs, action="policy_register") == [(theirs, "policy_register", "")]
    assert await found(clients.admin, product_id=str(uuid4())) == []
    both = await found(clients.admin, action="start", limit=6)
    assert (
        both
        == [(theirs, "start", "u2")]
        + [(theirs, "start", "u1")] * 2
        + [(ours, "start", "u2")]
        + [(ours, "start", "u1")] * 2
    )


async def test_operators_too_have_to_say_what_they_mean(clients: Clients) -> None:
    assert (await refused(audit(clients, clients.admin, user_id="u1"))).startswith("INVALID_REQUEST: user_id: ")
    assert (await refused(audit(clients, clients.admin, product_id="x"))).startswith("INVALID_REQUEST: product_id: ")
