"""A call with an idempotency key is carried out once, whatever breaks on its way there and back."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from psycopg.conninfo import conninfo_to_dict

from september.provisioner.v1 import product_service_pb2 as product_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from tests.harness import Clients, Platform, Product, Service, eventually, reason

pytestmark = pytest.mark.early(20)

Connect = Callable[..., Clients]
LEASE = {"ORCH_OPERATION_LEASE_S": "1"}
METHODS = ["ProvisionEngine", "RotateEngineKey", "DestroyEngine", "RegisterProduct", "RotatePlatformKey"]
CLAIM = b"INSERT INTO idempotency_keys"
COMMIT = b"COMMIT"
KEEP = b"coalesce(answer"


class Proxy:
    """A TCP proxy that loses replies, and the connection with them.

    Args:
        connect: to what is behind it.
    """

    def __init__(self, connect: Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]) -> None:
        self._connect = connect
        self._writers: set[asyncio.StreamWriter] = set()
        self._carriers: list[asyncio.Task[None]] = []
        # The next reply to a message with these bytes is lost; a commit's only if a key was claimed before.
        self.lost: bytes | None = None
        self.mute = False
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, away = await self._connect()
        self._writers |= {writer, away}
        claimed = lost = False

        async def forth() -> None:
            nonlocal claimed, lost
            while data := await reader.read(65536):
                claimed = (claimed or CLAIM in data) and b"ROLLBACK" not in data
                if self.lost is not None and self.lost in data and (claimed or self.lost != COMMIT):
                    lost, self.lost = True, None
                away.write(data)

        async def back() -> None:
            while (data := await there.read(65536)) and not lost:
                if not self.mute:
                    writer.write(data)

        async def carry(data: Awaitable[None]) -> None:
            with suppress(ConnectionError):
                await data
            # The end of one way is that of both.
            for end in (writer, away):
                end.close()

        self._carriers += [asyncio.create_task(carry(way)) for way in (forth(), back())]

    async def cut(self) -> None:
        """Closes every connection."""
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._carriers)


@asynccontextmanager
async def proxy(connect: Any) -> AsyncIterator[Proxy]:
    lossy = Proxy(connect)
    server = await asyncio.start_server(lossy.serve, "127.0.0.1", 0)
    lossy.port = server.sockets[0].getsockname()[1]
    try:
        yield lossy
    finally:
        server.close()
        await lossy.cut()


@asynccontextmanager
async def database_proxy(platform: Platform) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy before PostgreSQL, and the database's URL through it."""
    of = conninfo_to_dict(platform.database_url)
    async with proxy(lambda: asyncio.open_unix_connection(f"{of['host']}/.s.PGSQL.{of.get('port', 5432)}")) as lossy:
        yield lossy, f"postgresql://{of['user']}@127.0.0.1:{lossy.port}/{of['dbname']}?sslmode=disable"


class Life:
    """A call with a key, to be made again and again."""

    def __init__(self, platform: Platform, product: Product, method: str) -> None:
        self.platform = platform
        self.product = product
        self.method = method
        self.user_id = f"u{uuid4().hex}"
        self.slug = f"p{uuid4().hex[:20]}"
        self.key = uuid4().hex

    async def prepare(self, clients: Clients) -> None:
        if self.method in ("RotateEngineKey", "DestroyEngine"):
            await clients.provisioner.ProvisionEngine(
                pb.ProvisionEngineRequest(user_id=self.user_id), metadata=self.product.metadata
            )

    def call(self, clients: Clients) -> Any:
        keyed = (("idempotency-key", self.key),)
        if self.method == "RegisterProduct":
            policy = ParseDict({"max_engines": 1}, Struct())
            request = product_pb.RegisterProductRequest(slug=self.slug, policy=policy)
            return clients.products.RegisterProduct(request, metadata=clients.admin + keyed)
        if self.method == "RotatePlatformKey":
            rotate = product_pb.RotatePlatformKeyRequest(product_id=self.product.product_id, grace_s=604_800)
            return clients.products.RotatePlatformKey(rotate, metadata=clients.admin + keyed)
        on_engine = getattr(pb, f"{self.method}Request")(user_id=self.user_id)
        return getattr(clients.provisioner, self.method)(on_engine, metadata=self.product.metadata + keyed)

    async def answer(self, clients: Clients, deadline_s: float = 60) -> Any:
        """Calls until there is an answer."""
        async with asyncio.timeout(deadline_s):
            while True:
                try:
                    return await self.call(clients)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise

    async def check(self, clients: Clients, answer: Any) -> None:
        """One effect, and an answer that is true and stays."""
        assert await self.call(clients) == answer
        if self.method in ("RegisterProduct", "RotatePlatformKey"):
            registered = self.method == "RegisterProduct"
            product_id = answer.product_id if registered else self.product.product_id
            action = "policy_register" if registered else "key_rotate"
            effects = "SELECT 1 FROM audit_events WHERE product_id = %s AND action = %s"
            assert len(self.platform.query(effects, product_id, action)) == 1
            product = Product(product_id, self.slug, answer.platform_api_key)
            ensured = await clients.provisioner.EnsureEngine(
                pb.EnsureEngineRequest(user_id="nobody"), metadata=product.metadata
            )
            assert ensured.denial
            return
        kind = {"ProvisionEngine": "provision", "RotateEngineKey": "rotate_key", "DestroyEngine": "destroy"}
        effects = "SELECT 1 FROM audit_events WHERE user_id = %s AND action = %s AND outcome = 'succeeded'"
        assert len(self.platform.query(effects, self.user_id, kind[self.method])) == 1
        ensured = await clients.provisioner.EnsureEngine(
            pb.EnsureEngineRequest(user_id=self.user_id), metadata=self.product.metadata
        )
        if self.method == "DestroyEngine":
            assert ensured.denial
        else:
            assert ensured.engine.api_key == answer.api_key


@pytest.mark.parametrize("pool", [0, 2], ids=["cold", "pooled"])
async def test_many_calls_with_one_key_over_two_provisioners_are_one(
    platform: Platform, connect: Connect, pool: int
) -> None:
    both = [platform.provisioner(ORCH_WARM_POOL_SIZE=str(pool)) for _ in range(2)]
    clients = [connect(platform, provisioner) for provisioner in both]
    product = await clients[0].register()
    ready = "SELECT 1 FROM engines WHERE product_id IS NULL AND status = 'running'"
    await asyncio.to_thread(eventually, lambda: len(platform.query(ready)) == pool, "the pool is full")
    for method in METHODS[: 1 if pool else None]:
        life = Life(platform, await clients[0].register() if method == "RotatePlatformKey" else product, method)
        await life.prepare(clients[0])
        answers = await asyncio.gather(*(life.call(clients[i % 2]) for i in range(50)))
        assert all(answer == answers[0] for answer in answers)
        await life.check(clients[0], answers[0])


async def test_of_many_different_calls_with_one_key_one_is_answered(platform: Platform, connect: Connect) -> None:
    both = [platform.provisioner() for _ in range(2)]
    clients = [connect(platform, provisioner) for provisioner in both]
    product = await clients[0].register()
    for method in ("ProvisionEngine", "RegisterProduct"):
        lives = [Life(platform, product, method) for _ in range(20)]
        for life in lives:
            life.key = lives[0].key
        answers = await asyncio.gather(
            *(life.call(clients[i % 2]) for i, life in enumerate(lives)), return_exceptions=True
        )
        refusals = [reason(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert refusals == ["IDEMPOTENCY_CONFLICT"] * 19
    assert platform.query("SELECT count(*) FROM engines") == [(1,)]


@pytest.mark.parametrize("lost", [COMMIT, KEEP], ids=["commit", "keep"])
async def test_a_call_whose_transaction_ended_unknown_is_made_again_and_done_once(
    platform: Platform, connect: Connect, lost: bytes
) -> None:
    async with AsyncExitStack() as stack:
        lossy, url = await stack.enter_async_context(database_proxy(platform))
        provisioner = await asyncio.to_thread(platform.provisioner, ORCH_DATABASE_URL=url)
        stack.push_async_callback(asyncio.to_thread, provisioner.terminate)
        clients = connect(platform, provisioner)
        product = await clients.register()
        for method in METHODS:
            life = Life(platform, product, method)
            await life.prepare(clients)
            lossy.lost = lost
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await life.call(clients)
            assert lossy.lost is None
            assert reason(error.value) == "UNAVAILABLE"
            await life.check(clients, await life.answer(clients))


async def test_a_call_whose_reply_was_lost_is_given_it_later(platform: Platform, connect: Connect) -> None:
    provisioner = platform.provisioner()
    clients = connect(platform, provisioner)
    product = await clients.register()
    kept = "SELECT 1 FROM idempotency_keys WHERE answer IS NOT NULL"
    for method in METHODS:
        life = Life(platform, product, method)
        await life.prepare(clients)
        before = len(platform.query(kept))
        async with proxy(lambda: asyncio.open_connection("127.0.0.1", provisioner.port)) as lossy:
            through = Clients(platform, f"127.0.0.1:{lossy.port}")
            await through.provisioner.EnsureEngine(pb.EnsureEngineRequest(user_id="nobody"), metadata=product.metadata)
            lossy.mute = True
            call = asyncio.ensure_future(life.call(through))
            await asyncio.to_thread(eventually, lambda n=before: len(platform.query(kept)) > n, "it is answered")
            await lossy.cut()
            with pytest.raises(grpc.aio.AioRpcError):
                await call
            await through.close()
        await life.check(clients, await life.call(clients))


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 8))])
async def test_calls_of_a_provisioner_killed_at_any_moment_are_answered_by_the_next(
    platform: Platform, connect: Connect, seed: int
) -> None:
    chance = random.Random(seed)

    def start() -> Service:
        return platform.provisioner(**LEASE, ORCH_WARM_POOL_SIZE=str(chance.randrange(3)))

    provisioner = start()
    for _ in range(2):
        clients = connect(platform, provisioner)
        lives = [Life(platform, await clients.register(), method) for method in METHODS]
        await asyncio.gather(*(life.prepare(clients) for life in lives))
        calls = [asyncio.ensure_future(life.call(clients)) for life in lives]
        # The moment is the point here, not a wait for anything.
        await asyncio.wait(calls, timeout=chance.uniform(0.0, 0.4))
        provisioner.kill()
        first = await asyncio.gather(*calls, return_exceptions=True)
        provisioner = start()
        clients = connect(platform, provisioner)
        again = await asyncio.gather(*(life.answer(clients) for life in lives))
        for life, before, after in zip(lives, first, again, strict=True):
            assert isinstance(before, grpc.aio.AioRpcError) or before == after
            await life.check(clients, after)
    counts = await asyncio.to_thread(platform.counts_at_rest)
    assert len(set(counts.values())) == 1, counts
