"""Who may call what: every method of every service, by everybody, on every way in."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2

from september.provisioner.v1 import product_service_pb2 as product_pb
from september.provisioner.v1 import provisioner_service_pb2 as pb
from services.cli.gateway import Lane
from services.shared.authorization import ROLES, Role
from services.shared.keys import new_platform_key
from tests.canaries import Canaries
from tests.e2e.gateway_calls import METHODS, SERVICES
from tests.e2e.gateway_process import Gateway, Inside, running_gateway
from tests.harness import Clients, Platform, reason

FIGURE = "authorization matrix cells right; canary secrets found"
SERVED, ABSENT = "served", "absent"
NO_PLATFORM_KEY, NO_ADMIN_KEY = "INVALID_PLATFORM_KEY", "INVALID_ADMIN_KEY"
VICTIM = "victim"
# Those that leave an engine as it is, and those of them that answer with its key.
READS = {"Admit", "GetEngine", "EnsureEngine", "GetEngineHistory", "WatchEngine"}
SHOW_A_KEY = {"Admit", "GetEngine", "EnsureEngine"}
# Without what these need nothing is done, and with it something is.
INCOMPLETE = {"ProvisionEngine", "RegisterProduct", "UpdatePolicy"}
# What no role is for, and nobody can call.
NOWHERE = [
    "/grpc.health.v1.Health/List",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.channelz.v1.Channelz/GetServers",
    "/september.provisioner.v1.ProvisionerService/NoSuchMethod",
    "/september.admission.v1.AdmissionService/NoSuchMethod",
]
DESCRIPTORS = {f"/{s.full_name}/{m.name}": m for s in SERVICES for m in s.methods}
HEALTH = {path for path in ROLES if path.startswith("/grpc.health")}
OF_OPERATORS = {
    path
    for path in DESCRIPTORS
    if "ProductService" in path
    or path.endswith(("/ListEngines", "/ListAuditEvents", "/GetFleetStatus", "/GetFleetMetrics"))
}
OF_PRODUCTS = {path for path in DESCRIPTORS if "ProductService" not in path and not path.endswith("/EnsureEngine")}
# In which replicas say that they are there, whether anybody calls or not.
REPLICAS = {"admission_replicas", "loop_leases", "rate_replicas"}
# What was counted is added up meanwhile, and remains the same.
COUNTED = "SELECT product_id, name, sum(n) FROM counts GROUP BY 1, 2 HAVING sum(n) <> 0 ORDER BY 1, 2"

Headers = list[tuple[str, str]]
# The way in, the method, the caller.
Cell = tuple[str, str, str]

# Who is told so with a key that may be right comes again.
TOO_MANY, RETRY_AFTER_S, TRIES = "too many wrong keys", 1, 10


@dataclass(frozen=True)
class Caller:
    """Args:
    platform_key, admin_key: whether what it shows of each is right; None if it shows nothing.
    owns: whether it is the product whose engine there is.
    """

    name: str
    headers: Headers
    platform_key: bool | None = None
    admin_key: bool | None = None
    owns: bool = False


def expected(path: str, caller: Caller, *, platform: bool = True, admin: bool = True) -> str:
    """What a method answers a caller, of whose headers these two come through."""
    platform_key, admin_key = caller.platform_key if platform else None, caller.admin_key if admin else None
    role = ROLES[path]
    if role is Role.ANYONE:
        return SERVED
    if role is Role.ADMIN:
        return SERVED if admin_key else NO_ADMIN_KEY
    if role is Role.PRODUCT_OR_ADMIN and admin_key is not None:
        return SERVED if admin_key else NO_PLATFORM_KEY
    return SERVED if platform_key else NO_PLATFORM_KEY


def served(path: str, caller: Caller) -> str:
    """What a method answers whom it serves, of a harmless request."""
    name = path.rpartition("/")[2]
    if name in INCOMPLETE:
        return "INVALID_REQUEST"
    fields = harmless(path, caller)
    if "product_id" in fields:
        return "PRODUCT_NOT_FOUND"
    if "user_id" not in fields or (caller.owns and fields["user_id"] == VICTIM):
        return "OK"
    return "engine_not_found" if name in ("Admit", "EnsureEngine") else "ENGINE_NOT_FOUND"


def harmless(path: str, caller: Caller) -> dict[str, Any]:
    """Fields of a request that does nothing if it is carried out; whoever may read asks for the victim."""
    name = path.rpartition("/")[2]
    known = DESCRIPTORS[path].input_type.fields_by_name if path in DESCRIPTORS else ()
    if name in INCOMPLETE or name.startswith("List"):
        return {}
    # A watch of an engine that there is does not end.
    reads = name in READS and not (caller.owns and name == "WatchEngine")
    nothing = {"user_id": VICTIM if reads else "nobody", "product_id": str(uuid4())}
    return {name: value for name, value in nothing.items() if name in known}


def denial(answer: dict[str, Any]) -> str:
    return str(answer.get("reason") or answer.get("denial") or "OK")


@dataclass
class Scene:
    """An installation with an engine, and everybody who may come.

    Args:
        canaries: secrets, which nobody is answered with but the engine's key its owner.
        names: of the engine and its product, of which only they and operators know.
        cells: every call.
        wrong: what came of some, and should not have.
        found: what was in answers that it must not be in.
    """

    platform: Platform
    product_id: str
    callers: list[Caller]
    canaries: Canaries
    names: Canaries
    cells: set[Cell] = field(default_factory=set)
    wrong: dict[Cell, str] = field(default_factory=dict)
    found: dict[Cell, set[str]] = field(default_factory=dict)

    def effective(self, path: str) -> dict[str, Any]:
        """Fields of a request that does as much as can be."""
        known = DESCRIPTORS[path].input_type.fields_by_name
        fields = {
            "user_id": VICTIM,
            "product_id": self.product_id,
            "slug": f"p{uuid4().hex[:20]}",
            "policy": {"max_engines": 0},
        }
        return {name: value for name, value in fields.items() if name in known}

    def note(self, way: str, path: str, caller: Caller, outcome: str, wanted: str, answer: bytes) -> None:
        cell = (way, path, caller.name)
        self.cells.add(cell)
        right = served(path, caller) if wanted == SERVED else wanted
        if outcome != right:
            self.wrong[cell] = f"{outcome}, not {right}"
        found = self.canaries.found(answer)
        if not (caller.owns or caller.admin_key):
            found |= self.names.found(answer)
        shown = {"engine key"} if caller.owns and right == "OK" and path.rpartition("/")[2] in SHOW_A_KEY else set()
        if found != shown:
            self.found[cell] = found ^ shown

    def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row, with the transaction that wrote it, by table; what is counted, in sums."""
        query = self.platform.query
        tables = {name for (name,) in query("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}
        assert tables > {*REPLICAS, "counts"}
        written = tables - REPLICAS - {"counts"}
        rows = {table: query(f"SELECT xmin::text, t::text FROM {table} t ORDER BY t::text") for table in written}
        return {**rows, "counts": query(COUNTED)}

    async def grpc(self, channel: grpc.aio.Channel, way: str, path: str, caller: Caller, wanted: str) -> None:
        request = b""
        if path in DESCRIPTORS:
            made: Message = GetMessageClass(DESCRIPTORS[path].input_type)()
            for name, value in (harmless(path, caller) if wanted == SERVED else self.effective(path)).items():
                if isinstance(value, dict):
                    getattr(made, name).update(value)
                else:
                    setattr(made, name, value)
            request = made.SerializeToString()
        # Each comes from elsewhere, or their wrong keys would be too many; the gateway does not believe it.
        metadata = [*caller.headers, ("x-envoy-external-address", str(uuid4()))]
        for _ in range(TRIES):
            try:
                if path.endswith(("/WatchEngine", "/Watch")):
                    stream: Any = channel.unary_stream(path)
                    call = stream(request, metadata=metadata, timeout=30)
                    answer = await anext(aiter(call))
                    call.cancel()
                else:
                    unary: Any = channel.unary_unary(path)
                    answer = await unary(request, metadata=metadata, timeout=30)
                outcome = "OK"
                if path in DESCRIPTORS:
                    kind: Any = GetMessageClass(DESCRIPTORS[path].output_type)
                    outcome = denial(MessageToDict(kind.FromString(answer)))
                break
            except grpc.aio.AioRpcError as error:
                answer = f"{error} {error.trailing_metadata()}".encode()
                if TOO_MANY not in (error.details() or ""):
                    absent = error.code() is grpc.StatusCode.UNIMPLEMENTED
                    outcome = ABSENT if absent else reason(error)
                    break
                # Over gRPC the gateway names no reason of this; the last time it counts as a wrong answer.
                outcome = TOO_MANY
                await asyncio.sleep(RETRY_AFTER_S)
        self.note(way, path, caller, outcome, wanted, answer)

    async def rest(self, gateway: Gateway, listener: str, way: str, path: str, caller: Caller, wanted: str) -> None:
        method = METHODS[path.rpartition("/")[2]]
        fields = harmless(path, caller) if wanted == SERVED else self.effective(path)
        verb, target = method.rest.split()
        for name in list(fields):
            if f"{{{name}}}" in target:
                target = target.replace(f"{{{name}}}", fields.pop(name))
        target = target.partition("?")[0]
        body = fields.get("policy", {}) if target.endswith("/policy") else fields
        encoded = None if verb == "GET" else json.dumps(body).encode()
        for _ in range(TRIES):
            answer = await gateway.rest(verb, target, encoded, caller.headers, listener=listener)
            if TOO_MANY.encode() not in answer.body:
                break
            await asyncio.sleep(RETRY_AFTER_S)
        outcome = denial(answer.json()) if answer.status == 200 else answer.error()[1]
        if outcome == "ROUTE_NOT_FOUND":
            outcome = ABSENT
        self.note(way, path, caller, outcome, wanted, f"{answer.headers}".encode() + answer.body)


@pytest.fixture
async def scene(platform: Platform, connect: Callable[..., Clients]) -> Scene:
    quiet = dict.fromkeys(("ORCH_HEALTH_CHECK_INTERVAL_S", "ORCH_RECONCILE_INTERVAL_S"), "3600")
    platform.environment |= quiet
    provisioner = platform.provisioner()
    platform.admission(provisioner)
    clients = connect(platform, provisioner)
    product, other, disabled, rotated = [await clients.register() for _ in range(4)]
    engine = await clients.provisioner.ProvisionEngine(
        pb.ProvisionEngineRequest(user_id=VICTIM), metadata=product.metadata
    )
    await clients.products.DisableProduct(
        product_pb.DisableProductRequest(product_id=disabled.product_id), metadata=clients.admin
    )
    new = await clients.products.RotatePlatformKey(
        product_pb.RotatePlatformKeyRequest(product_id=rotated.product_id), metadata=clients.admin
    )
    good, admin = ("x-platform-key", product.key), ("x-admin-key", platform.admin_key)

    def shows(key: str) -> Headers:
        return [("x-platform-key", key)]

    callers = [
        Caller("nobody", []),
        Caller("malformed key", shows("nonsense"), platform_key=False),
        Caller("unknown key", shows(new_platform_key()), platform_key=False),
        Caller("disabled product", shows(disabled.key), platform_key=False),
        Caller("key from before a rotation", shows(rotated.key), platform_key=False),
        Caller("engine's key", shows(engine.api_key), platform_key=False),
        Caller("product", [good], platform_key=True, owns=True),
        # Who is served, and finds nothing of the first one's.
        Caller("other product", shows(other.key), platform_key=True),
        Caller("product, twice", [good, good], platform_key=False),
        Caller("product, then nonsense", [good, ("x-platform-key", "nonsense")], platform_key=False),
        Caller("operator", [admin], admin_key=True),
        Caller("operator, twice", [admin, admin], admin_key=False),
        Caller("wrong admin key", [("x-admin-key", "a" * 32)], admin_key=False),
        Caller("platform key as admin key", [("x-admin-key", product.key)], admin_key=False),
        Caller("admin key as platform key", shows(platform.admin_key), platform_key=False),
        Caller("both", [good, admin], platform_key=True, admin_key=True, owns=True),
        Caller("the one as the other", [(good[0], admin[1]), (admin[0], good[1])], platform_key=False, admin_key=False),
        Caller("bearer", [("authorization", f"Bearer {platform.admin_key}")]),
    ]
    secrets = Canaries(**{"engine key": engine.api_key, "admin key": platform.admin_key})
    secrets.add("master key", platform.environment["ORCH_MASTER_KEY"])
    for key in (product.key, other.key, disabled.key, rotated.key, new.platform_api_key):
        secrets.add("platform key", key)
    names = Canaries(engine=engine.engine_id, product=product.product_id, slug=product.slug)
    return Scene(platform, product.product_id, callers, secrets, names)


@pytest.mark.figure(FIGURE)
async def test_everybody_is_served_what_is_theirs_on_every_way_in_and_nothing_else(
    scene: Scene, tmp_path: Path, score: Callable[[str, str, bool], None]
) -> None:
    provisioner, admission = scene.platform.services
    inside = Inside(
        "services.admission.lane:app", {**scene.platform.environment, "ORCH_PROVISIONER_ADDR": provisioner.address}
    )
    calls: list[tuple[str, Any]] = []
    logs = [tmp_path / lane / name for lane in Lane for name in ("stdout", "stderr")]
    async with AsyncExitStack() as stack:

        async def channel(address: str) -> grpc.aio.Channel:
            return await stack.enter_async_context(grpc.aio.insecure_channel(address))

        for service, module in ((provisioner, "provisioner"), (admission, "admission")):
            direct = await channel(service.address)
            for caller in scene.callers:
                for path in [*ROLES, *NOWHERE]:
                    here = f".{module}." in path or path in HEALTH
                    wanted = expected(path, caller) if here and path in ROLES else ABSENT
                    calls.append((wanted, scene.grpc(direct, module, path, caller, wanted)))
        for lane in Lane:
            (tmp_path / lane).mkdir()
            placed = inside if lane is Lane.FAST else admission.address
            gateway = await stack.enter_async_context(running_gateway(tmp_path / lane, placed, provisioner.address))
            for listener, served, hears in (
                (gateway.address, OF_PRODUCTS, {"admin": False}),
                (gateway.operators, OF_OPERATORS, {"platform": False}),
            ):
                through = await channel(listener)
                way = f"{lane} {'products' if served is OF_PRODUCTS else 'operators'}"
                for caller in scene.callers:
                    for path in [*DESCRIPTORS, *HEALTH, *NOWHERE]:
                        # What is not Admission's is the same in both lanes.
                        if lane is Lane.FAST and "Admission" not in path:
                            continue
                        wanted = expected(path, caller, **hears) if path in served else ABSENT
                        calls.append((wanted, scene.grpc(through, f"{way}, gRPC", path, caller, wanted)))
                        if path.rpartition("/")[2] in METHODS and path in DESCRIPTORS:
                            calls.append((wanted, scene.rest(gateway, listener, f"{way}, REST", path, caller, wanted)))
        before = scene.rows()
        await many([call for wanted, call in calls if wanted != SERVED])
        after = scene.rows()
        assert {table for table in before if before[table] != after[table]} == set()
        await many([call for wanted, call in calls if wanted == SERVED])
    assert len(scene.cells) == len(calls) > 2000

    in_files = scene.canaries.found_in_files([*scene.platform.directory.rglob("*.log"), *logs])
    right = f"{1 - len(scene.wrong) / len(calls):.2%} of {len(calls):,}"
    score(FIGURE, f"{right}; {len(scene.found) + len(in_files)}", not (scene.wrong or scene.found or in_files))
    assert not scene.wrong
    assert not scene.found
    assert not in_files


async def many(calls: list[Any]) -> None:
    """So many at a time that it is quick and nobody is too busy to answer."""
    for start in range(0, len(calls), 20):
        await asyncio.gather(*calls[start : start + 20])


def test_every_method_has_a_role_and_no_role_is_wider_than_it_must() -> None:
    health = health_pb2.DESCRIPTOR.services_by_name["Health"]
    served = {f"/{health.full_name}/{name}" for name in ("Check", "Watch")}
    assert set(ROLES) == {*DESCRIPTORS, *served}
    of = {role: {path for path in ROLES if ROLES[path] is role} for role in Role}
    assert of[Role.ANYONE] == {*served, *(path for path in ROLES if path.endswith("/CheckHealth"))}
    assert of[Role.ADMIN] == {path for path in ROLES if "ProductService" in path}
    assert of[Role.PRODUCT_OR_ADMIN] == OF_OPERATORS - of[Role.ADMIN]
