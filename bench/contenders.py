"""Everything that answers in one run: ours and the references, each under a name and ready to be loaded."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import psutil

from bench.installation import PRODUCTS, Installation
from bench.loads import Call, Measured, grpc_call, h2load, once, wrk
from bench.peers import direct_response, noop
from bench.platform import Server, envoy, free_address, peer, started_gateway
from services.cli.gateway import Lane

NO_OP = "no-op, grpc.aio"
ADMIT = "Admit, grpc.aio host"
PLAIN_GRPC = "Admit, gRPC, plain gateway"
PLAIN_REST = "Admit, REST, plain gateway"
FAST_GRPC = "Admit, gRPC, fast lane"
FAST_REST = "Admit, REST, fast lane"
FEW_USERS = f"the same with {PRODUCTS} users alone"
DIRECT = "Envoy direct_response"
ONE_PROCESS = "one process, FastAPI + asyncpg"

_GRPC = {Lane.GRPC: PLAIN_GRPC, Lane.FAST: FAST_GRPC}
_REST = {Lane.GRPC: PLAIN_REST, Lane.FAST: FAST_REST}
# About as long as a request of Admit.
_NO_OP_MESSAGE = b"a no-op message"
_PACED_CONCURRENCY = 64


class Contender(Protocol):
    @property
    def server(self) -> Server:
        """What answers."""

    def saturate(self, concurrency: int, seconds: float) -> Measured:
        """So many calls at once, each followed by the next."""

    def paced(self, rate_s: float, seconds: float) -> Measured:
        """So many calls a second, with the latency of each."""


@dataclass(frozen=True)
class Grpc:
    """Args:
    server: that answers.
    calls: for a process of h2load each; drawn anew for every run.
    """

    server: Server
    calls: Callable[[], list[Call]]

    def saturate(self, concurrency: int, seconds: float) -> Measured:
        return h2load(self.calls(), concurrency=concurrency, duration_s=seconds)

    def paced(self, rate_s: float, seconds: float) -> Measured:
        return h2load(self.calls(), concurrency=_PACED_CONCURRENCY, duration_s=seconds, rate_s=rate_s, latency=True)


@dataclass(frozen=True)
class Rest:
    """Args:
    subject: whose users call.
    server: that answers.
    requests: file for wrk, with all draws.
    answer_bytes: size of the body of an answer, at least.
    """

    subject: Installation
    server: Server
    requests: Path
    answer_bytes: int

    def saturate(self, concurrency: int, seconds: float) -> Measured:
        return wrk(
            self.server.address,
            self.requests,
            concurrency=concurrency,
            duration_s=seconds,
            answer_bytes=self.answer_bytes,
        )

    def paced(self, rate_s: float, seconds: float) -> Measured:
        calls = self.subject.rest_calls(self.server.address, self.answer_bytes)
        return h2load(calls, concurrency=_PACED_CONCURRENCY, duration_s=seconds, rate_s=rate_s, latency=True)


@contextmanager
def rest_admits(subject: Installation, lane: Lane, directory: Path) -> Iterator[Rest]:
    """Admits by REST, with a gateway of their own, behind which every user is known already."""
    with started_gateway(subject, lane, directory) as server:
        answer_bytes = subject.rest_answer_bytes(server.address)
        once(subject.all_calls(server.address, answer_bytes))
        yield Rest(subject, server, subject.rest_requests(directory / f"{lane}.requests"), answer_bytes)


@contextmanager
def contenders(subject: Installation, lanes: Iterable[Lane], directory: Path) -> Iterator[dict[str, Contender]]:
    """Starts all; inside, they answer. Of a lane that can't be had nothing does."""
    with ExitStack() as stack:
        answering: dict[str, Contender] = {}
        no_op = stack.enter_context(peer("noop", directory))
        no_op_call = grpc_call(no_op.address, noop.METHOD, _NO_OP_MESSAGE, _NO_OP_MESSAGE, "-")
        answering[NO_OP] = Grpc(no_op, lambda: [no_op_call] * PRODUCTS)
        host = Server(subject.admission.address, (psutil.Process(subject.admission.process.pid),))
        answering[ADMIT] = Grpc(host, partial(subject.grpc_calls, host.address))
        for lane in lanes:
            rest = stack.enter_context(rest_admits(subject, lane, directory))
            answering[_GRPC[lane]] = Grpc(rest.server, partial(subject.grpc_calls, rest.server.address))
            answering[_REST[lane]] = rest
        # h2load knows one body, and so one user, a process; by REST, what that hides can be seen.
        answering[FEW_USERS] = replace(rest, requests=subject.rest_requests(directory / "few.requests", PRODUCTS))
        address = free_address()
        direct = envoy(
            "direct", direct_response.config(address, json.dumps("x" * rest.answer_bytes)), address, directory
        )
        answering[DIRECT] = replace(rest, server=stack.enter_context(direct))
        platform = subject.platform
        one_process = peer("one_process", directory, platform.database_url, platform.environment["ORCH_MASTER_KEY"])
        answering[ONE_PROCESS] = replace(rest, server=stack.enter_context(one_process))
        yield answering
