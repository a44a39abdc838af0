"""One of everything on a whole platform, and then a search for its secrets wherever they must not be."""

import asyncio
import json
import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import grpc
import psycopg
import pytest
from cryptography.fernet import Fernet

from services.cli.gateway import Lane
from tests.canaries import Canaries
from tests.e2e.gateway_calls import UNARY, Method
from tests.e2e.gateway_process import Endpoint
from tests.e2e.installation import Installation, install
from tests.harness import DEADLINE_S

__all__ = ["install"]

Install = Callable[..., Installation]
Headers = list[tuple[str, str]]

PLATFORM_KEYS, ENGINE_KEYS = {"platform key"}, {"engine key"}
NOTHING: set[str] = set()
# What answers may hold, by the contract; all others hold none.
GIVEN = {
    "RegisterProduct": PLATFORM_KEYS,
    "RotatePlatformKey": PLATFORM_KEYS,
    "Admit": ENGINE_KEYS,
    "GetEngine": ENGINE_KEYS,
    "ProvisionEngine": ENGINE_KEYS,
    "RotateEngineKey": ENGINE_KEYS,
}
# All but the slowest, which is a matter of the engine alone.
PROVOKED = {
    "BACKEND_ERROR",
    "ENGINE_ALREADY_EXISTS",
    "ENGINE_ALREADY_RUNNING",
    "ENGINE_NOT_FOUND",
    "ENGINE_NOT_RUNNING",
    "INTERNAL",
    "INVALID_ADMIN_KEY",
    "INVALID_PLATFORM_KEY",
    "INVALID_REQUEST",
    "POLICY_DENIED",
    "PORT_EXHAUSTION",
    "PRODUCT_NOT_FOUND",
    "PRODUCT_SLUG_EXISTS",
    "QUOTA_EXCEEDED",
    "RATE_LIMITED",
    "ROUTE_NOT_FOUND",
    "UNAVAILABLE",
}


class Callers:
    """Calls as products and operators make them; what they are answered is searched at once.

    Args:
        gateway: what answers.
        canaries: gets to know every key that is given.
        admin_key: of the operators.
    """

    def __init__(self, gateway: Endpoint, canaries: Canaries, admin_key: str) -> None:
        self.gateway = gateway
        self.canaries = canaries
        self.admin: Headers = [("x-admin-key", admin_key)]
        self.codes: set[str] = set()
        self.given: defaultdict[str, set[str]] = defaultdict(set)

    async def rest(
        self, verb: str, path: str, headers: Headers, body: Any = None, *, gives: set[str] = NOTHING, raw: bytes = b""
    ) -> Any:
        """The answer's JSON."""
        encoded = raw or (None if body is None else json.dumps(body).encode())
        answer = await self.gateway.rest(verb, path, encoded, headers)
        parsed = answer.json()
        if answer.status != 200:
            self.codes.add(parsed["error"]["code"])
            gives = NOTHING
        self._search(f"{verb} {path}", str(answer.headers).encode() + answer.body, gives)
        return parsed

    async def register(self, **policy: Any) -> tuple[str, Headers]:
        """A new product's id and what shows that one is it."""
        body = {"slug": f"p{uuid4().hex[:20]}", "policy": {"max_engines": 10, **policy}}
        made = await self.rest("POST", "/products/register", self.admin, body, gives=PLATFORM_KEYS)
        return made["product_id"], [("x-platform-key", made["platform_api_key"])]

    async def grpc(self, channel: grpc.aio.Channel, method: Method, headers: Headers) -> None:
        called: Any = channel.unary_unary(method.grpc_path)
        call = called(method.request("u1").SerializeToString(), metadata=headers, timeout=DEADLINE_S)
        gives = GIVEN.get(method.name, NOTHING)
        try:
            text = await call
        except grpc.aio.AioRpcError as error:
            text, gives = str(error.details()).encode(), NOTHING
        about = f"{await call.initial_metadata()}{await call.trailing_metadata()}"
        self._search(method.name, text, gives)
        self._search(method.name, about.encode(), NOTHING)

    def _search(self, call: str, text: bytes, gives: set[str]) -> None:
        for key in re.findall(r"[ps]k-sept-[\w-]{43}", text.decode(errors="replace")):
            name = "platform key" if key.startswith("pk") else "engine key"
            self.canaries.add(name, key)
            self.given[name].add(key)
        assert self.canaries.found(text) <= gives, call


async def live_a_life(callers: Callers, registry: "psycopg.Connection[Any]", channels: list[grpc.aio.Channel]) -> None:
    """Every call, as it should be and in every way wrong."""
    rest, admin = callers.rest, callers.admin
    product_id, product = await callers.register(allowed_images=["services.engine", "tests.engines.*"])
    _, other = await callers.register()
    # Twice the same answer, which is kept for that.
    once = [("idempotency-key", "k1")]
    for who, path, body, gives in (
        (admin, "/products/register", {"slug": "once", "policy": {"max_engines": 1}}, PLATFORM_KEYS),
        (product, "/engines/provision", {"user_id": "u2"}, ENGINE_KEYS),
    ):
        first = await rest("POST", path, who + once, body, gives=gives)
        assert await rest("POST", path, who + once, body, gives=gives) == first
    engine = await rest("POST", "/engines/u1/admit", product, {"auto_provision": True}, gives=ENGINE_KEYS)
    await rest("GET", "/engines/u1", product, gives=ENGINE_KEYS)
    await rest("POST", "/engines/u1/rotate-key", product, gives=ENGINE_KEYS)
    current = (await rest("GET", "/engines/u1", product, gives=ENGINE_KEYS))["api_key"]
    await talk(engine["engine"]["url"], current, callers.canaries)
    for path in ("/engines", "/status", "/metrics", "/audit", "/engines/u1/history"):
        await rest("GET", path, product)
    async with callers.gateway.lines("/engines/u1/watch", product) as lines:
        assert callers.canaries.found(json.dumps(await anext(aiter(lines))).encode()) == NOTHING
    for action in ("stop", "stop", "start", "start"):
        await rest("POST", f"/engines/u2/{action}", product)
    for action in ("sleep", "wake"):
        await rest("POST", f"/engines/u2/{action}", product)

    # Keys in the wrong places, and none.
    wrong = [("x-platform-key", f"pk-sept-{secrets.token_urlsafe(32)}")]
    callers.canaries.add("wrong key", wrong[0][1])
    swapped = [("x-platform-key", admin[0][1]), ("x-admin-key", product[0][1])]
    for headers in ([], wrong, product * 2, swapped, [("x-platform-key", current)]):
        await rest("POST", "/engines/u1/admit", headers, {})
        await rest("GET", "/audit", headers)
        await rest("GET", "/products", headers)
    await rest("GET", f"/engines?platform_key={product[0][1]}", product)
    await rest("POST", "/engines/u1/admit", product, raw=b'{"x": "' + product[0][1].encode())
    await rest("GET", "/nowhere", product)
    for who in (other, product):
        await rest("GET", "/engines/nobody", who)

    # What policies, quotas and ports do not allow.
    body = {"user_id": "u3", "engine_version": "tests.engines.exits"}
    await rest("POST", "/engines/provision", product, body)
    await rest("POST", "/engines/provision", other, body)
    await rest("POST", "/engines/provision", product, {"user_id": "u2"})
    await rest("POST", "/engines/provision", other, {"user_id": "u3"}, gives=ENGINE_KEYS)
    await rest("POST", "/engines/provision", other, {"user_id": "u4"})
    _, poor = await callers.register(max_engines=0, rate_limit_rpm=1)
    await rest("POST", "/engines/provision", poor, {"user_id": "u1"})
    for _ in range(2):
        await rest("POST", "/engines/u1/admit", poor, {})
    found = (await rest("GET", f"/products/{product_id}", admin))["product"]
    await rest("POST", "/products/register", admin, {"slug": found["slug"], "policy": {"max_engines": 1}})
    await rest("PUT", f"/products/{product_id}/policy", admin, {"max_engines": 10, "allowed_images": []})
    await rest("PUT", f"/products/{uuid4()}/policy", admin, {"max_engines": 1})
    for path in ("/products", "/engines", "/status", "/metrics", "/audit"):
        await rest("GET", path, admin)

    # Engines whose keys were exchanged in the registry get nobody in, and a bug shows nothing.
    exchange = (
        "UPDATE engines SET encrypted_key = other.encrypted_key FROM engines AS other"
        " WHERE engines.product_id = other.product_id AND engines.user_id <> other.user_id"
    )
    registry.execute(exchange)
    assert (await rest("POST", "/engines/u2/admit", product, {}))["error"]["code"] == "INTERNAL"
    registry.execute(exchange)
    registry.execute("ALTER TABLE audit_events RENAME TO lost")
    assert (await rest("GET", "/audit", admin))["error"]["code"] == "INTERNAL"
    registry.execute("ALTER TABLE lost RENAME TO audit_events")

    for method in UNARY:
        for headers in ([], wrong, swapped, product, admin):
            for channel in channels:
                await callers.grpc(channel, method, headers)

    # A registry that is away and back.
    with gone(registry):
        assert (await rest("GET", "/status", product))["error"]["code"] == "UNAVAILABLE"
    async with asyncio.timeout(DEADLINE_S):
        while "error" in await rest("GET", "/status", product):  # noqa: ASYNC110 - it happens in other processes
            await asyncio.sleep(0.05)

    await rest("POST", f"/products/{product_id}/rotate-key", admin, {"grace_s": 60}, gives=PLATFORM_KEYS)
    await rest("DELETE", "/engines/u2", product)
    for action in ("disable", "enable"):
        await rest("POST", f"/products/{product_id}/{action}", admin)


async def talk(url: str, key: str, canaries: Canaries) -> None:
    """With an engine, as one who may and as one who may not."""
    async with aiohttp.ClientSession() as session:
        for shown, status in ((key, 200), (f"{key}x", 401)):
            post = session.post(f"{url}/execute", json={"message": "hello"}, headers={"X-Engine-Key": shown})
            async with post as answer:
                assert answer.status == status
                assert canaries.found(await answer.read()) == NOTHING


@contextmanager
def gone(registry: "psycopg.Connection[Any]") -> Iterator[None]:
    """PostgreSQL serves this database to nobody within the block, but for this connection."""
    info = registry.info
    with psycopg.connect(f"host={info.host} user={info.user} dbname=postgres", autocommit=True) as elsewhere:
        elsewhere.execute(f"ALTER DATABASE {info.dbname} ALLOW_CONNECTIONS false".encode())
        elsewhere.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> %s",
            [info.dbname, info.backend_pid],
        )
        yield
        elsewhere.execute(f"ALTER DATABASE {info.dbname} ALLOW_CONNECTIONS true".encode())


def dump(registry_url: str) -> bytes:
    """Every table, as text."""
    with psycopg.connect(registry_url) as registry:
        tables = registry.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        )
        rows = []
        for (table,) in tables.fetchall():
            with registry.cursor().copy(f"COPY {table} TO STDOUT".encode()) as copy:
                rows += [bytes(row) for row in copy]
    return b"".join(rows)


@pytest.mark.parametrize("lane", Lane)
async def test_no_secret_is_where_it_must_not_be(
    install: Install, database_url: str, tmp_path: Path, lane: Lane
) -> None:
    role, password = f"canary_{uuid4().hex[:12]}", secrets.token_urlsafe(24)
    with psycopg.connect(database_url, autocommit=True) as registry:
        registry.execute(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{password}'".encode())
        postgres_log = Path(registry.execute("SHOW data_directory").fetchone()[0]) / "log"  # type: ignore[index]
    values = {
        "ORCH_DATABASE_URL": database_url.replace("postgres:@", f"{role}:{password}@"),
        "ORCH_MASTER_KEY": Fernet.generate_key().decode(),
        "ORCH_ADMIN_KEY": secrets.token_urlsafe(24),
    }
    assert password in values["ORCH_DATABASE_URL"]
    for name, value in values.items():
        (tmp_path / name).write_text(f"{value}\n")
    new_master_key = Fernet.generate_key().decode()
    canaries = Canaries(
        **{"password": password, "master key": values["ORCH_MASTER_KEY"], "admin key": values["ORCH_ADMIN_KEY"]}
    )
    canaries.add("master key", new_master_key)

    files = {f"{name}_FILE": str(tmp_path / name) for name in values}
    # So few that they run out.
    installation = install(**files, ORCH_PORT_MIN="26000", ORCH_PORT_MAX="26002", ORCH_WARM_POOL_SIZE="0")
    up = installation.up("--lane", lane)
    announced = installation.announced()
    canaries.add("platform key", announced["PLATFORM_KEY"])
    address, operators = (announced[name].removeprefix("http://") for name in ("REST_URL", "ADMIN_URL"))
    callers = Callers(Endpoint(address, operators), canaries, announced["ADMIN_KEY"])
    with psycopg.connect(database_url, autocommit=True) as registry:
        async with grpc.aio.insecure_channel(address) as channel, grpc.aio.insecure_channel(operators) as admin_channel:
            await live_a_life(callers, registry, [channel, admin_channel])
    assert callers.codes >= PROVOKED
    assert {name: len(keys) for name, keys in callers.given.items()} == {"platform key": 5, "engine key": 4}
    (tmp_path / "ORCH_MASTER_KEY").write_text(f"{new_master_key},{values['ORCH_MASTER_KEY']}\n")
    rotated = installation.run("keys", "rotate")
    assert rotated.returncode == 0
    assert canaries.found(f"{rotated.stdout}{rotated.stderr}".encode()) == NOTHING

    processes = installation.processes()
    assert {"provisioner", "engine", "envoy"} <= installation.names()
    for process in processes:
        assert canaries.found(f"{process.environ()}{process.cmdline()}".encode()) == NOTHING, process
    tables = dump(database_url)
    assert b"u1" in tables
    assert canaries.found(tables) == NOTHING
    # What is there to be read by its owner holds what is looked for.
    var = installation.var
    meant = {str(var / "run" / "env"), str(var / "secrets" / "demo_process_platform_key")}
    assert canaries.found((var / "run" / "env").read_bytes()) == {"password", "admin key", "platform key"}
    assert set(canaries.found_in_files(var.rglob("*"))) == meant

    up.terminate()
    assert await asyncio.to_thread(up.wait, DEADLINE_S) == 0
    logs = b"".join(log.read_bytes() for log in (var / "log").iterdir())
    for word in (
        b"call_failed",
        b"registry_unreachable",
        b"Traceback",
        b"UnreadableKey",
        b'"path":"/engines/u1/admit"',
    ):
        assert word in logs
    assert b"statement" in postgres_log.read_bytes().lower()
    assert set(canaries.found_in_files([*var.rglob("*"), installation.output, postgres_log])) <= meant
