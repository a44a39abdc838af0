"""An installation with engines in its registry, and users who call."""

import asyncio
import json
import random
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import psycopg

from bench.loads import Call, grpc_call
from september.admission.v1 import admission_service_pb2 as pb
from services.cli.rest import Listener
from services.shared.keys import EngineKeyring, new_engine_key
from tests.harness import Clients, Platform, Product, Service, running_platform

ADMIT = "/september.admission.v1.AdmissionService/Admit"
# Several, because no product may have more than a million admits a minute.
PRODUCTS = 8
MOST_ACTIVE = 10_000
_PRODUCT_POLICY = {"max_engines": 1_000_000, "rate_limit_rpm": 1_000_000}
# Draws, of which a load makes its calls in turn.
_DRAWS = 50_000


@dataclass(frozen=True)
class Installation:
    """A platform whose registry has `engines` engines, and an Admission of its own.

    User number i is a user of product i modulo `PRODUCTS`. The first `active` of them, drawn by
    Zipf's law, call; their engines are running, those of all others sleep.
    """

    platform: Platform
    products: Sequence[Product]
    engines: int
    active: int
    provisioner: Service
    admission: Service

    def draw(self, count: int, product: int | None = None) -> list[int]:
        """Numbers of users, the n-th of them 1/n times as often as the first.

        Args:
            product: of its users alone; None for all.
        """
        users = range(self.active) if product is None else range(product, self.active, PRODUCTS)
        weights = list(accumulate(1 / (user + 1) for user in users))
        return [users[bisect(weights, random.random() * weights[-1])] for _ in range(count)]

    def anybody(self) -> tuple[Product, str]:
        """One of those who call, all of them alike."""
        user = random.randrange(self.active)
        return self.products[user % PRODUCTS], _user_id(user)

    def grpc_calls(self, address: str, products: Iterable[int] = range(PRODUCTS)) -> list[Call]:
        """Admits of one drawn user of each of these products, by gRPC at `address`; each is tried once."""
        calls = []
        with admits(address) as admit:
            for number in products:
                product = self.products[number]
                request = pb.AdmitRequest(user_id=_user_id(self.draw(1, number)[0]))
                answer = admit(request, product)
                assert answer.admitted, answer
                call = grpc_call(address, ADMIT, request.SerializeToString(), answer.SerializeToString(), product.key)
                calls.append(call)
        return calls

    def rest_answer_bytes(self, address: str) -> int:
        """Size of the body of an admit by REST."""
        status, answer = Listener(address).call("POST", _path(0), {"X-Platform-Key": self.products[0].key}, {})
        assert status == 200, answer
        assert answer["admitted"], answer
        return len(json.dumps(answer, separators=(",", ":")))

    def rest_calls(self, address: str, answer_bytes: int) -> list[Call]:
        """Admits of drawn users by REST, a call for each product."""
        drawn = [self.draw(_DRAWS // PRODUCTS, number) for number in range(PRODUCTS)]
        return self._rest_calls(address, answer_bytes, drawn, http1=True)

    def all_calls(self, address: str, answer_bytes: int) -> list[Call]:
        """Admits of every active user by REST, a call for each product."""
        everybody = [range(number, self.active, PRODUCTS) for number in range(PRODUCTS)]
        return self._rest_calls(address, answer_bytes, everybody, http1=False)

    def _rest_calls(
        self, address: str, answer_bytes: int, users: Iterable[Iterable[int]], *, http1: bool
    ) -> list[Call]:
        return [
            Call(
                address,
                [_path(user) for user in called],
                {"content-type": "application/json", "x-platform-key": product.key},
                b"{}",
                answer_bytes,
                http1=http1,
            )
            for product, called in zip(self.products, users, strict=True)
        ]

    def rest_requests(self, file: Path, users: int | None = None) -> Path:
        """Writes admits by REST as `wrk` takes them: of drawn users, or in turn of so many drawn once."""
        drawn = self.draw(_DRAWS if users is None else users)
        file.write_text("".join(f"{_path(user)}\t{self.products[user % PRODUCTS].key}\n" for user in drawn))
        return file


def _user_id(number: int) -> str:
    return f"user-{number:07}"


def _path(user: int) -> str:
    return f"/engines/{_user_id(user)}/admit"


@contextmanager
def admits(address: str) -> Iterator[Callable[[pb.AdmitRequest, Product], pb.AdmitResponse]]:
    """Calls Admit at `address` over gRPC, and blocks."""
    with grpc.insecure_channel(address) as channel:
        call: Any = channel.unary_unary(ADMIT, pb.AdmitRequest.SerializeToString, pb.AdmitResponse.FromString)
        yield lambda request, product: call(request, metadata=product.metadata)


@contextmanager
def installation(database_url: str, directory: Path, engines: int, **settings: str) -> Iterator[Installation]:
    """An installation on an empty database, with so many engines in its registry."""
    directory.mkdir()
    with running_platform(database_url, directory, **settings) as platform:
        provisioner = platform.provisioner()
        products = register(platform, provisioner, PRODUCTS)
        active = min(engines, MOST_ACTIVE)
        _fill(platform, products, engines, active)
        admission = platform.admission(provisioner)
        yield Installation(platform, products, engines, active, provisioner, admission)


def register(platform: Platform, provisioner: Service, count: int) -> list[Product]:
    """Registers products whose limits are the highest that there are."""

    async def registered() -> list[Product]:
        clients = Clients(platform, provisioner.address)
        try:
            return [await clients.register(**_PRODUCT_POLICY) for _ in range(count)]
        finally:
            await clients.close()

    return asyncio.run(registered())


def _fill(platform: Platform, products: Sequence[Product], engines: int, active: int) -> None:
    """Engines of no node that a Provisioner looks after: nobody probes or repairs what does not run."""
    keyring = EngineKeyring([platform.environment["ORCH_MASTER_KEY"]])
    ids = [uuid4() for _ in range(active)]
    values = {
        "products": [product.product_id for product in products],
        "ids": ids,
        "users": [_user_id(number) for number in range(active)],
        "keys": [keyring.encrypt(engine_id, new_engine_key()) for engine_id in ids],
        "active": active,
        "engines": engines,
    }
    with psycopg.connect(platform.database_url, autocommit=True) as connection:
        # What triggers would do for each is done once below, or concerns who listens already: nobody.
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO engines"
            " (engine_id, product_id, user_id, status, image, node, url, encrypted_key, last_health_at)"
            " SELECT id, (%(products)s::uuid[])[(n - 1) %% array_length(%(products)s::uuid[], 1) + 1], user_id,"
            " 'running', 'services.engine', 'bench', 'http://127.0.0.1:' || 10000 + n, key, clock_timestamp()"
            " FROM unnest(%(ids)s::uuid[], %(users)s::text[], %(keys)s::bytea[]) WITH ORDINALITY"
            " AS engine (id, user_id, key, n)",
            values,
        )
        connection.execute(
            "INSERT INTO engines (engine_id, product_id, user_id, status, image, node, url, encrypted_key)"
            " SELECT gen_random_uuid(), (%(products)s::uuid[])[n %% array_length(%(products)s::uuid[], 1) + 1],"
            " 'user-' || lpad(n::text, 7, '0'), 'sleeping', 'services.engine', 'bench', 'http://127.0.0.1:9', 'x'"
            " FROM generate_series(%(active)s, %(engines)s - 1) AS n",
            values,
        )
        connection.execute(
            "INSERT INTO counts SELECT product_id, 'engines:' || status, count(*) FROM engines GROUP BY 1, 2"
        )
        connection.execute("ANALYZE")
