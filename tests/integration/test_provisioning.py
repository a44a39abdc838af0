"""The Provisioner's own calls, over gRPC and with real engines: what can go wrong, and what is left then."""

import asyncio
import socket
from collections.abc import Callable
from uuid import UUID

import grpc
import pytest

from september.engine.v1 import engine_pb2
from september.provisioner.v1 import product_service_pb2 as product_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from tests.harness import Clients, Platform, Product, Service, eventually, reason

Shared = tuple[Platform, list[Service]]
Connect = Callable[..., Clients]
NOTHING = {"rows": 0, "ports": 0, "processes": 0, "volumes": 0}


def provision(
    clients: Clients, product: Product, user_id: str = "u1", image: str = ""
) -> "grpc.aio.UnaryUnaryCall[pb.ProvisionEngineRequest, pb.ProvisionEngineResponse]":
    return clients.provisioner.ProvisionEngine(
        pb.ProvisionEngineRequest(user_id=user_id, engine_version=image), metadata=product.metadata
    )


def destroy(
    clients: Clients, product: Product, user_id: str = "u1"
) -> "grpc.aio.UnaryUnaryCall[pb.DestroyEngineRequest, pb.DestroyEngineResponse]":
    return clients.provisioner.DestroyEngine(pb.DestroyEngineRequest(user_id=user_id), metadata=product.metadata)


async def test_an_engine_is_made_once_and_destroyed_with_all_that_it_had(platform: Platform, connect: Connect) -> None:
    clients = connect(platform, platform.provisioner())
    product = await clients.register()
    made = await provision(clients, product)
    assert made.status == engine_pb2.Engine.Status.running
    assert made.url.startswith("http://127.0.0.1:2")
    assert platform.counts() == {"rows": 1, "ports": 1, "processes": 1, "volumes": 1}

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await provision(clients, product)
    assert reason(error.value) == "ENGINE_ALREADY_EXISTS"

    destroyed = await destroy(clients, product)
    assert (destroyed.status, destroyed.engine_id) == ("destroyed", made.engine_id)
    assert platform.counts() == NOTHING
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await destroy(clients, product)
    assert reason(error.value) == "ENGINE_NOT_FOUND"
    actions = platform.query(
        "SELECT action, outcome FROM audit_events WHERE engine_id = %s ORDER BY event_id", UUID(made.engine_id)
    )
    assert actions == [
        ("provision", "requested"),
        ("provision", "succeeded"),
        ("destroy", "requested"),
        ("destroy", "succeeded"),
    ]


async def test_the_fourth_engine_on_three_ports_is_refused_until_one_is_free(
    platform: Platform, connect: Connect
) -> None:
    clients = connect(platform, platform.provisioner(ORCH_PORT_MIN="22000", ORCH_PORT_MAX="22002"))
    product = await clients.register()
    await asyncio.gather(*(provision(clients, product, f"u{i}") for i in range(3)))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await provision(clients, product, "u3")
    assert (reason(error.value), error.value.code()) == ("PORT_EXHAUSTION", grpc.StatusCode.UNAVAILABLE)
    assert platform.counts()["rows"] == 3

    await destroy(clients, product, "u1")
    await provision(clients, product, "u3")
    assert platform.counts() == {"rows": 3, "ports": 3, "processes": 3, "volumes": 3}


async def test_a_port_that_the_host_refuses_is_set_aside_and_the_next_one_taken(
    platform: Platform, connect: Connect
) -> None:
    clients = connect(platform, platform.provisioner(ORCH_PORT_MIN="22010", ORCH_PORT_MAX="22012"))
    product = await clients.register()
    with socket.create_server(("127.0.0.1", 22010)), socket.create_server(("127.0.0.1", 22012)):
        made = await provision(clients, product)
        assert made.url == "http://127.0.0.1:22011"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await provision(clients, product, "u2")
    assert reason(error.value) == "PORT_EXHAUSTION"
    assert platform.counts() == {"rows": 1, "ports": 1, "processes": 1, "volumes": 1}


@pytest.mark.parametrize(
    ("image", "code"),
    [("tests.engines.never_healthy", "BOOT_TIMEOUT"), ("tests.engines.exits", "BACKEND_ERROR")],
)
async def test_an_engine_that_does_not_come_up_leaves_nothing_behind(
    platform: Platform, connect: Connect, image: str, code: str
) -> None:
    clients = connect(platform, platform.provisioner(ORCH_BOOT_TIMEOUT_S="2"))
    product = await clients.register(allowed_images=["tests.engines.*"])
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await provision(clients, product, image=image)
    assert reason(error.value) == code
    assert platform.counts() == NOTHING
    outcomes = platform.query("SELECT action, outcome, error_code FROM audit_events WHERE outcome <> 'requested'")
    assert ("provision", "failed", code) in outcomes


async def test_all_who_wait_for_a_boot_learn_that_it_failed(platform: Platform, connect: Connect) -> None:
    provisioner = platform.provisioner(ORCH_BOOT_TIMEOUT_S="2", ORCH_ENGINE_IMAGE="tests.engines.never_healthy")
    clients = connect(platform, provisioner)
    product = await clients.register()
    calls = [
        clients.provisioner.EnsureEngine(
            pb.EnsureEngineRequest(user_id="u1", auto_provision=True), metadata=product.metadata
        )
        for _ in range(5)
    ]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [reason(e) for e in errors if isinstance(e, grpc.aio.AioRpcError)] == ["BOOT_TIMEOUT"] * 5
    assert platform.counts() == NOTHING


@pytest.mark.parametrize(
    ("image", "code"),
    [
        ("tests.engines.slow_boot", "POLICY_DENIED"),
        ("services.engine.evil", "POLICY_DENIED"),
        ("169.254.169.254/x", "POLICY_DENIED"),
        ("services.engine; reboot", "INVALID_REQUEST"),
        ("-x", "INVALID_REQUEST"),
        ("x" * 256, "INVALID_REQUEST"),
    ],
)
async def test_an_image_outside_of_the_policy_is_refused_before_anything_is_written(
    clients: Clients, shared: Shared, image: str, code: str
) -> None:
    product = await clients.register()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await provision(clients, product, image=image)
    assert reason(error.value) == code
    assert shared[0].query("SELECT 1 FROM operations WHERE product_id = %s", UUID(product.product_id)) == []


async def test_a_destroy_makes_a_boot_give_way(platform: Platform, connect: Connect) -> None:
    clients = connect(platform, platform.provisioner())
    product = await clients.register(allowed_images=["tests.engines.*"])
    boot = asyncio.ensure_future(provision(clients, product, image="tests.engines.never_healthy"))
    await asyncio.to_thread(
        eventually, lambda: platform.query("SELECT 1 FROM operations WHERE step = 'probing'"), "the boot is probing"
    )
    destroyed = await destroy(clients, product)
    assert destroyed.status == "destroyed"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await boot
    assert reason(error.value) == "UNAVAILABLE"
    assert platform.counts() == NOTHING
    kinds = platform.query("SELECT kind, outcome FROM operations ORDER BY created_at")
    assert kinds == [("provision", "cancelled"), ("destroy", "succeeded")]


@pytest.mark.parametrize("status", ["provisioning", "running", "sleeping", "stopped", "failed", "destroying"])
async def test_destroy_is_legal_from_every_state(clients: Clients, shared: Shared, status: str) -> None:
    product = await clients.register()
    engine_id = UUID((await provision(clients, product)).engine_id)
    shared[0].query("UPDATE engines SET status = %s WHERE engine_id = %s", status, engine_id)
    assert (await destroy(clients, product)).engine_id == str(engine_id)
    assert shared[0].query("SELECT 1 FROM port_leases WHERE engine_id = %s", engine_id) == []


async def test_ten_destroys_at_once_destroy_once_and_all_succeed(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    engine_id = (await provision(clients, product)).engine_id
    answers = await asyncio.gather(*(destroy(clients, product) for _ in range(10)), return_exceptions=True)
    # A call that comes when all is over finds nothing.
    ids = {a.engine_id for a in answers if isinstance(a, pb.DestroyEngineResponse)}
    codes = {reason(a) for a in answers if isinstance(a, grpc.aio.AioRpcError)}
    assert ids == {engine_id}
    assert codes <= {"ENGINE_NOT_FOUND"}
    destroys = shared[0].query(
        "SELECT count(*) FROM operations WHERE engine_id = %s AND kind = 'destroy'", UUID(engine_id)
    )
    assert destroys == [(1,)]


async def test_a_tightened_quota_destroys_nothing_and_refuses_the_next(clients: Clients) -> None:
    product = await clients.register(max_engines=2)
    await asyncio.gather(provision(clients, product, "u1"), provision(clients, product, "u2"))
    request = product_pb.UpdatePolicyRequest(product_id=product.product_id)
    request.policy.update({"max_engines": 1})
    answer = await clients.products.UpdatePolicy(request, metadata=clients.admin)
    assert answer.policy.max_engines == 1
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await provision(clients, product, "u3")
    assert reason(error.value) == "QUOTA_EXCEEDED"
    await destroy(clients, product, "u1")
    await destroy(clients, product, "u2")
    await provision(clients, product, "u3")


def test_a_second_provisioner_on_the_port_ends_and_says_so(platform: Platform) -> None:
    first = platform.provisioner()
    with pytest.raises(AssertionError, match=rf"(?s)^ended with 1: .*{first.address} is taken"):
        platform.provisioner(ORCH_PROVISIONER_LISTEN=first.address)
