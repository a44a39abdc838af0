"""Admit under concurrency, through two Admissions: one engine per user, and never over a limit."""

import asyncio
import time
from collections import Counter

import grpc
import pytest

from september.admission.v1 import admission_service_pb2 as pb
from tests.harness import Clients, Platform, Service, eventually, reason, retry_after_s

Shared = tuple[Platform, list[Service]]


async def test_fifty_first_admits_of_one_user_make_one_engine(clients: Clients, shared: Shared) -> None:
    product = await clients.register()
    request = pb.AdmitRequest(user_id="u1", auto_provision=True)
    answers = await asyncio.gather(
        *(clients.admissions[i % 2].Admit(request, metadata=product.metadata) for i in range(50))
    )
    assert all(answer.admitted for answer in answers)
    assert len({answer.SerializeToString(deterministic=True) for answer in answers}) == 1
    operations = shared[0].query("SELECT kind, outcome FROM operations WHERE product_id = %s", product.product_id)
    assert operations == [("provision", "succeeded")]


async def test_two_hundred_users_never_exceed_ten_engines(clients: Clients, shared: Shared) -> None:
    product = await clients.register(max_engines=10)
    samples: list[int] = []
    done = asyncio.Event()

    async def sample() -> None:
        while not done.is_set():
            rows = await asyncio.to_thread(
                shared[0].query, "SELECT count(*) FROM engines WHERE product_id = %s", product.product_id
            )
            samples.append(rows[0][0])

    async def first_admit(index: int) -> str:
        request = pb.AdmitRequest(user_id=f"u{index}", auto_provision=True)
        try:
            answer = await clients.admissions[index % 2].Admit(request, metadata=product.metadata)
        except grpc.aio.AioRpcError as error:
            return reason(error)
        assert answer.admitted
        return "admitted"

    sampler = asyncio.create_task(sample())
    outcomes = Counter(await asyncio.gather(*(first_admit(i) for i in range(200))))
    done.set()
    await sampler
    assert outcomes == {"admitted": 10, "QUOTA_EXCEEDED": 190}
    assert max(samples) == 10


async def test_all_of_the_limit_is_admitted_through_both_and_no_more(clients: Clients) -> None:
    product = await clients.register(rate_limit_rpm=60)
    outcomes: Counter[str] = Counter()
    waits: list[float] = []

    async def client(index: int) -> None:
        for _ in range(20):
            try:
                await clients.admissions[index % 2].Admit(pb.AdmitRequest(user_id="u1"), metadata=product.metadata)
                outcomes["admitted"] += 1
            except grpc.aio.AioRpcError as error:
                outcomes[reason(error)] += 1
                waits.append(retry_after_s(error))

    await asyncio.gather(*(client(i) for i in range(8)))
    # Denied admits count like any other; those refused by the limiter do not.
    assert outcomes == {"admitted": 60, "RATE_LIMITED": 100}
    assert all(0 < wait <= 60 for wait in waits)


async def test_calls_refused_for_their_key_or_their_form_do_not_count(clients: Clients) -> None:
    product = await clients.register(rate_limit_rpm=1)
    for metadata, user_id in (((), "u1"), ((("x-platform-key", "pk-sept-no"),), "u1"), (product.metadata, "")):
        with pytest.raises(grpc.aio.AioRpcError):
            await clients.admission.Admit(pb.AdmitRequest(user_id=user_id), metadata=metadata)
    await clients.admission.Admit(pb.AdmitRequest(user_id="u1"), metadata=product.metadata)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await clients.admission.Admit(pb.AdmitRequest(user_id="u1"), metadata=product.metadata)
    assert reason(error.value) == "RATE_LIMITED"


@pytest.mark.parametrize("cancel_after_s", [0.001, 0.01, 0.1, 0.5])
async def test_a_client_that_cancels_leaves_exactly_one_engine(
    clients: Clients, shared: Shared, cancel_after_s: float
) -> None:
    platform, _ = shared
    product = await clients.register()
    call = clients.admission.Admit(pb.AdmitRequest(user_id="u1", auto_provision=True), metadata=product.metadata)
    begun = time.monotonic()
    await asyncio.wait([asyncio.ensure_future(call)], timeout=cancel_after_s)
    call.cancel()
    assert time.monotonic() - begun < 5

    answer = await clients.admission.Admit(
        pb.AdmitRequest(user_id="u1", auto_provision=True), metadata=product.metadata
    )
    assert answer.admitted
    operations = await asyncio.to_thread(
        eventually,
        lambda: platform.query(
            "SELECT kind, outcome FROM operations WHERE product_id = %s AND finished_at IS NOT NULL",
            product.product_id,
        ),
        "the boot has ended",
    )
    assert operations == [("provision", "succeeded")]


async def test_a_boot_whose_only_caller_went_away_ends_with_a_running_engine(clients: Clients, shared: Shared) -> None:
    platform, _ = shared
    product = await clients.register()
    call = clients.admission.Admit(pb.AdmitRequest(user_id="u1", auto_provision=True), metadata=product.metadata)
    task = asyncio.ensure_future(call)
    await asyncio.to_thread(
        eventually,
        lambda: platform.query("SELECT FROM engines WHERE product_id = %s", product.product_id),
        "the engine was asked for",
    )
    call.cancel()
    await asyncio.wait([task])
    await asyncio.to_thread(
        eventually,
        lambda: platform.query("SELECT FROM engines WHERE product_id = %s AND status = 'running'", product.product_id),
        "the engine runs",
    )
