"""Admit through real servers: the contract's session and each of its silent cases."""

import asyncio
import os
import signal
from uuid import uuid4

import grpc
import psutil
import pytest

from september.admission.v1 import admission_service_pb2 as pb
from september.engine.v1 import denial_pb2, engine_pb2
from september.provisioner.v1 import provisioner_service_pb2 as provisioner_pb
from tests.harness import Clients, Platform, Product, Service, eventually

STATUS = engine_pb2.Engine.Status
REASON = denial_pb2.Denial.Reason

Shared = tuple[Platform, list[Service]]


@pytest.fixture
def registry(shared: Shared) -> Platform:
    return shared[0]


async def admit(clients: Clients, product: Product, user_id: str = "u1", **flags: bool) -> pb.AdmitResponse:
    return await clients.admission.Admit(pb.AdmitRequest(user_id=user_id, **flags), metadata=product.metadata)


def set_status(registry: Platform, engine_id: str, status: str) -> None:
    registry.query("UPDATE engines SET status = %s WHERE engine_id = %s", status, engine_id)
    registry.replicas_know()


def queue(registry: Platform, engine_id: str, kind: str, after_s: float = 0) -> None:
    """Writes an operation as a Provisioner would, not to be taken up before `after_s` seconds."""
    registry.query(
        "INSERT INTO operations (operation_id, engine_id, product_id, user_id, node, kind, actor, not_before)"
        " SELECT %s, engine_id, product_id, user_id, node, %s, 'system',"
        " clock_timestamp() + make_interval(secs => %s) FROM engines WHERE engine_id = %s",
        uuid4(),
        kind,
        after_s,
        engine_id,
    )
    registry.replicas_know()


def process_of(registry: Platform, engine_id: str) -> psutil.Process:
    return next(p for p in registry.engine_processes() if p.environ()["SEPTEMBER_ENGINE_ID"] == engine_id)


async def test_a_user_without_an_engine_is_denied_unless_it_may_be_made(clients: Clients) -> None:
    product = await clients.register()
    denied = await admit(clients, product)
    assert not denied.admitted
    assert denied.reason == REASON.engine_not_found
    assert not denied.HasField("engine")

    first = await admit(clients, product, auto_provision=True)
    assert first.admitted
    assert not first.HasField("reason")
    assert first.engine.status == STATUS.running
    assert first.engine.user_id == "u1"
    assert first.engine.api_key.startswith("sk-sept-")
    assert first.engine.HasField("last_health_at")

    again = await clients.admissions[1].Admit(pb.AdmitRequest(user_id="u1"), metadata=product.metadata)
    assert again.engine == first.engine
    got = await clients.admission.GetEngine(pb.GetEngineRequest(user_id="u1"), metadata=product.metadata)
    assert got.engine == first.engine


async def test_an_admit_joins_a_boot_under_way_whatever_its_flags(clients: Clients, registry: Platform) -> None:
    product = await clients.register(allowed_images=["tests.engines.*"])
    boot = asyncio.ensure_future(
        clients.provisioner.ProvisionEngine(
            provisioner_pb.ProvisionEngineRequest(user_id="u1", engine_version="tests.engines.slow_boot"),
            metadata=product.metadata,
        )
    )
    await asyncio.to_thread(
        eventually,
        lambda: registry.query("SELECT FROM engines WHERE product_id = %s", product.product_id),
        "the boot has begun",
    )
    joined = await admit(clients, product)
    assert joined.admitted
    assert joined.engine.engine_id == (await boot).engine_id


async def test_a_sleeper_is_woken_only_if_asked(clients: Clients, registry: Platform) -> None:
    product = await clients.register()
    engine = (await admit(clients, product, auto_provision=True)).engine
    os.kill(process_of(registry, engine.engine_id).pid, signal.SIGSTOP)
    set_status(registry, engine.engine_id, "sleeping")

    assert (await admit(clients, product)).reason == REASON.engine_sleeping
    woken = await admit(clients, product, auto_wake=True)
    assert woken.engine.status == STATUS.running
    assert woken.engine.api_key == engine.api_key
    assert process_of(registry, engine.engine_id).status() != psutil.STATUS_STOPPED


async def test_a_deep_sleeper_is_started_again(clients: Clients, registry: Platform) -> None:
    product = await clients.register()
    engine = (await admit(clients, product, auto_provision=True)).engine
    process = process_of(registry, engine.engine_id)
    process.kill()
    set_status(registry, engine.engine_id, "sleeping")

    woken = await admit(clients, product, auto_wake=True)
    assert woken.engine.status == STATUS.running
    assert woken.engine.engine_id == engine.engine_id
    assert process_of(registry, engine.engine_id).pid != process.pid


async def test_a_stopped_engine_stays_stopped(clients: Clients, registry: Platform) -> None:
    product = await clients.register()
    engine = (await admit(clients, product, auto_provision=True)).engine
    set_status(registry, engine.engine_id, "stopped")
    denied = await admit(clients, product, auto_wake=True, auto_provision=True)
    assert denied.reason == REASON.engine_sleeping


async def test_a_failed_engine_is_unhealthy_between_restarts_and_joined_within_one(
    clients: Clients, registry: Platform
) -> None:
    product = await clients.register()
    engine = (await admit(clients, product, auto_provision=True)).engine
    process_of(registry, engine.engine_id).kill()
    set_status(registry, engine.engine_id, "failed")
    assert (await admit(clients, product, auto_wake=True)).reason == REASON.engine_unhealthy

    queue(registry, engine.engine_id, "start", after_s=3)
    joined = await admit(clients, product)
    assert joined.engine.status == STATUS.running
    assert joined.engine.engine_id == engine.engine_id


async def test_an_engine_being_destroyed_is_not_found_or_waited_out(clients: Clients, registry: Platform) -> None:
    product = await clients.register()
    engine = (await admit(clients, product, auto_provision=True)).engine
    set_status(registry, engine.engine_id, "destroying")
    queue(registry, engine.engine_id, "destroy", after_s=3)

    assert (await admit(clients, product, auto_wake=True)).reason == REASON.engine_not_found
    anew = await admit(clients, product, auto_provision=True)
    assert anew.admitted
    assert anew.engine.engine_id != engine.engine_id


async def test_a_caller_with_little_time_gets_an_answer_and_the_boot_goes_on(
    clients: Clients, registry: Platform
) -> None:
    product = await clients.register(allowed_images=["tests.engines.*", "services.engine"])
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await clients.provisioner.ProvisionEngine(
            provisioner_pb.ProvisionEngineRequest(user_id="u1", engine_version="tests.engines.slow_boot"),
            metadata=product.metadata,
            timeout=0.5,
        )
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await admit(clients, product)).admitted


async def test_products_do_not_see_each_others_engines(clients: Clients) -> None:
    owner, other = await clients.register(), await clients.register()
    await admit(clients, owner, auto_provision=True)
    assert (await admit(clients, other)).reason == REASON.engine_not_found
    errors = []
    for user_id in ("u1", "missing"):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await clients.admission.GetEngine(pb.GetEngineRequest(user_id=user_id), metadata=other.metadata)
        errors.append((error.value.code(), error.value.details(), error.value.trailing_metadata()))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await clients.provisioner.DestroyEngine(
                provisioner_pb.DestroyEngineRequest(user_id=user_id), metadata=other.metadata
            )
        errors.append((error.value.code(), error.value.details(), error.value.trailing_metadata()))
    assert all(error == errors[0] for error in errors)


@pytest.mark.parametrize(
    "user_id", ["a", "a/b", "日本語", "😀" * 255, "a b", "%2F", "..x", "a+b", "x" * 255, '"', "\\", "' OR 1=1 --"]
)
async def test_any_printable_user_id_is_an_id(clients: Clients, user_id: str) -> None:
    product = await clients.register()
    assert (await admit(clients, product, user_id)).reason == REASON.engine_not_found


@pytest.mark.parametrize("user_id", ["", ".", "..", "x" * 256, "a\nb", "\x00", "\x7f", "\x85", "a\u2028b", "\t"])
async def test_other_user_ids_are_refused_by_name(clients: Clients, user_id: str) -> None:
    product = await clients.register()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await admit(clients, product, user_id)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.value.details() or "").startswith("user_id: ")
