"""Answers that are lost after the work was done: whoever asks again gets the answer, and nothing is done twice."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct

from september.provisioner.v1 import product_service_pb2 as product_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from tests.chaos.oracle import oracle
from tests.chaos.score_card import Score
from tests.harness import Clients, Platform, Product, Service

pytestmark = pytest.mark.early(20)

FIGURE = "duplicate effects in 10,000 ambiguous replies"

CALLERS = 8
_FRAME_HEAD = 9
_HEADERS = 1


class Loser:
    """Stands before a Provisioner, and loses answers together with their connection.

    Args:
        provisioner: behind it.
        chance: whether the next answer is lost.
    """

    def __init__(self, provisioner: Service, chance: random.Random) -> None:
        self._port = provisioner.port
        self._chance = chance
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.lost = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Gives its port, at every address of this machine's own network."""
        server = await asyncio.start_server(self._serve, "0.0.0.0", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            # Who failed has left them open.
            for writer in self._open.values():
                writer.close()
            await asyncio.gather(*self._open)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        there, away = await asyncio.open_connection("127.0.0.1", self._port)
        forth = asyncio.create_task(_carry(reader, away))
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await there.readexactly(_FRAME_HEAD)
                payload = await there.readexactly(int.from_bytes(head[:3]))
                # An answer begins with its headers: then all is done that it tells of.
                if head[3] == _HEADERS and self._chance.random() < 0.5:
                    self.lost += 1
                    break
                writer.write(head + payload)
        for end in (writer, away):
            end.close()
        await forth
        del self._open[task]


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.close()


class Caller:
    """A product's backend that makes each call until it has an answer, and notes how often each thing was done.

    It looks by another way, so that only answers to calls that change something are lost.
    """

    def __init__(
        self, platform: Platform, clients: Clients, direct: Clients, product: Product, chance: random.Random
    ) -> None:
        self._platform = platform
        self._clients = clients
        self._direct = direct
        self._product = product
        self._chance = chance
        self.user_id = f"u{uuid4().hex}"
        self.asked: Counter[str] = Counter()
        self.slugs = 0

    async def live(self, loser: Loser, losses: int) -> None:
        """Makes an engine, calls for as long as too few answers were lost, and destroys it."""
        if self._chance.random() < 0.5:
            await self._keyed("provision", pb.ProvisionEngineRequest, "ProvisionEngine")
        else:
            # Without a key: a repeated call joins, or finds what it has made.
            self.asked["provision"] += 1
            await self._again(
                lambda: self._clients.provisioner.EnsureEngine(
                    pb.EnsureEngineRequest(user_id=self.user_id, auto_provision=True), metadata=self._product.metadata
                )
            )
        while loser.lost < losses:
            match self._chance.randrange(4):
                case 0:
                    await self._register()
                case 1 if self._chance.random() < 0.1:
                    await self._keyed("stop", pb.StopEngineRequest, "StopEngine")
                    await self._keyed("start", pb.StartEngineRequest, "StartEngine")
                case _:
                    answer = await self._keyed("rotate_key", pb.RotateEngineKeyRequest, "RotateEngineKey")
                    engine = await self._direct.provisioner.EnsureEngine(
                        pb.EnsureEngineRequest(user_id=self.user_id), metadata=self._product.metadata
                    )
                    assert engine.engine.api_key == answer.api_key
        await self._keyed("destroy", pb.DestroyEngineRequest, "DestroyEngine")

    def duplicates(self) -> int:
        """How many effects there are that nobody asked for, or that are missing."""
        effects = "SELECT action, count(*) FROM audit_events WHERE user_id = %s AND outcome = 'succeeded' GROUP BY 1"
        done: dict[str, int] = dict(self._platform.query(effects, self.user_id))
        slugs = "SELECT count(*) FROM products WHERE slug LIKE %s"
        registered = int(self._platform.query(slugs, f"p{self.user_id[1:16]}%")[0][0])
        actions = done.keys() | self.asked.keys()
        return sum(abs(done.get(a, 0) - self.asked[a]) for a in actions) + abs(registered - self.slugs)

    async def _keyed(self, action: str, request: Callable[..., Any], method: str) -> Any:
        self.asked[action] += 1
        metadata = (*self._product.metadata, ("idempotency-key", uuid4().hex))
        call = getattr(self._clients.provisioner, method)
        return await self._again(lambda: call(request(user_id=self.user_id), metadata=metadata))

    async def _register(self) -> None:
        """A slug can be taken once: what was done twice would be refused."""
        metadata = (*self._clients.admin, ("idempotency-key", uuid4().hex))
        slug = f"p{self.user_id[1:16]}{self.slugs}"
        self.slugs += 1
        policy = ParseDict({"max_engines": 1}, Struct())
        request = product_pb.RegisterProductRequest(slug=slug, policy=policy)
        answer = await self._again(lambda: self._clients.products.RegisterProduct(request, metadata=metadata))
        assert answer.platform_api_key

    async def _again(self, call: Callable[[], Any]) -> Any:
        async with asyncio.timeout(60):
            while True:
                try:
                    return await call()
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise


@pytest.mark.figure(FIGURE)
async def test_of_answers_that_are_lost_nothing_is_done_twice(
    platform: Platform, seed: int, extent: Callable[[int, int], int], score: Score
) -> None:
    chance = random.Random(seed)
    losses = extent(100, 3_400)
    provisioner = await asyncio.to_thread(platform.provisioner)
    loser = Loser(provisioner, chance)
    direct = Clients(platform, provisioner.address)
    product = await direct.register()
    async with loser.listening() as port:
        # An address each, and so a connection each: one's lost answer is not another's.
        clients = [Clients(platform, f"127.0.0.{i}:{port}") for i in range(1, CALLERS + 1)]
        callers = [Caller(platform, one, direct, product, chance) for one in clients]
        async with asyncio.TaskGroup() as group:
            for caller in callers:
                group.create_task(caller.live(loser, losses))
        for one in clients:
            await one.close()
    await direct.close()
    oracle(platform)
    assert set(platform.counts().values()) == {0}
    duplicates = sum(caller.duplicates() for caller in callers)
    score(FIGURE, f"{duplicates} in {loser.lost:,}", duplicates == 0)
    assert duplicates == 0
