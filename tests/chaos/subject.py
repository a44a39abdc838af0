"""One user whose engine things are done to, and what the user was told."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import psutil

from september.provisioner.v1 import provisioner_service_pb2 as pb
from services.shared.keys import EngineKeyring
from tests.chaos.crew import Crew
from tests.harness import Clients, Product, eventually
from tests.integration.test_life_cycle import accepted, process_of

_REQUESTS: dict[str, Callable[..., Any]] = {
    "Provision": pb.ProvisionEngineRequest,
    "Start": pb.StartEngineRequest,
    "Stop": pb.StopEngineRequest,
    "Sleep": pb.SleepEngineRequest,
    "Wake": pb.WakeEngineRequest,
    "RotateKey": pb.RotateEngineKeyRequest,
    "Destroy": pb.DestroyEngineRequest,
}
_ACTIONS = {"RotateKey": "rotate_key"}


class Subject:
    """Args:
    crew: does it.
    product: whose user it is.
    image: what the engine runs.
    """

    def __init__(self, crew: Crew, product: Product, image: str = "") -> None:
        self.user_id = f"u{uuid4().hex}"
        self.key = ""
        self._crew = crew
        self._platform = crew.platform
        self._product = product
        self._image = image
        self._has_data = False
        self._taken: socket.socket | None = None
        self._counted: dict[str, int] = {}

    async def prepare(self, *steps: str) -> None:
        """Makes calls, and lets things happen to the engine; what is there then is given data."""
        for step in steps:
            if step in _REQUESTS:
                await self.call(step)
            else:
                await getattr(self, step)()
        if self._engine() is not None:
            self._marker().touch()
            self._has_data = True

    async def call(self, verb: str, refusal: str | None = None) -> None:
        """Makes the call until it is answered, with one idempotency key; the answer is binding from then on."""
        metadata = (*self._product.metadata, ("idempotency-key", uuid4().hex))

        def call(clients: Clients) -> Any:
            fields = {"engine_version": self._image} if verb == "Provision" else {}
            request = _REQUESTS[verb](user_id=self.user_id, **fields)
            method = "RotateEngineKey" if verb == "RotateKey" else f"{verb}Engine"
            return getattr(clients.provisioner, method)(request, metadata=metadata, timeout=30)

        answer = await self._crew.told(call, refusal)
        if answer is not None:
            self._counted[verb] = self._counted.get(verb, 0) + 1
            self.key = getattr(answer, "api_key", "") or self.key

    def is_settled(self, status: str | None) -> bool:
        """Whether nothing is under way any more, and the engine is in this status; None for no engine."""
        engine = self._engine()
        return (engine and engine[0]) == status and self._platform.open_operations() == 0

    async def lost(self) -> list[str]:
        """What was acknowledged and is not so: the key, the data, the number of effects."""
        lost = []
        engine = self._engine()
        if engine is not None and self._has_data and not self._marker().exists():
            lost.append("volume")
        if engine is not None and engine[0] == "running" and not await accepted(engine[1], self.key):
            lost.append("key")
        for verb, count in self._counted.items():
            effects = (
                "SELECT count(*) FROM audit_events WHERE user_id = %s AND action = %s"
                " AND outcome = 'succeeded' AND actor <> 'system'"
            )
            if self._platform.query(effects, self.user_id, _ACTIONS.get(verb, verb.lower())) != [(count,)]:
                lost.append(f"{verb} is not there {count} times")
        return lost

    async def takes_the_key_handed_out(self) -> bool:
        """Whether the engine, if it is said to run, takes the key that is in the registry at this moment."""
        query = "SELECT status, generation, url, engine_id, encrypted_key FROM engines WHERE user_id = %s"
        keyring = EngineKeyring([self._platform.environment["ORCH_MASTER_KEY"]])
        while (rows := self._platform.query(query, self.user_id)) and rows[0][0] == "running":
            *_, url, engine_id, encrypted_key = rows[0]
            with suppress(aiohttp.ClientError):
                if await accepted(url, keyring.decrypt(engine_id, encrypted_key)):
                    return True
            # Unless the operation went on meanwhile.
            if rows == self._platform.query(query, self.user_id):
                return False
        return True

    async def take_port(self) -> None:
        """Something else listens on the engine's port."""
        [(port,)] = self._platform.query("SELECT port FROM port_leases WHERE engine_id = %s", self._id())
        self._taken = socket.create_server(("127.0.0.1", port))

    async def keep_awake(self) -> None:
        """Somebody holds the engine awake."""
        self._platform.query(
            "INSERT INTO engine_activity VALUES (%s, clock_timestamp(), clock_timestamp() + interval '1 hour')",
            self._id(),
        )

    async def sleep_long(self) -> None:
        """The engine has slept for as long as makes it sleep deeply."""
        self._platform.query(
            "UPDATE engines SET status_since = status_since - interval '1 day' WHERE engine_id = %s", self._id()
        )

    async def is_deep_asleep(self) -> None:
        """Waits until it is."""
        asleep = (
            "SELECT 1 FROM engines e WHERE engine_id = %s AND deep_asleep AND NOT EXISTS"
            " (SELECT FROM operations o WHERE o.engine_id = e.engine_id AND finished_at IS NULL)"
        )
        engine_id = self._id()
        await asyncio.to_thread(eventually, lambda: self._platform.query(asleep, engine_id), "it sleeps deeply", 60)

    async def sicken(self) -> None:
        """The engine, of the image for it, is not well."""
        self._marker().with_name("sick").touch()

    async def freeze(self) -> None:
        """The engine stops, and nobody knows why."""
        os.killpg(self._process(str(self._id())).pid, signal.SIGSTOP)

    async def forget(self) -> None:
        """The row goes as if the engine had been destroyed, and the engine stays."""
        engine_id = self._id()
        self._platform.query(
            "INSERT INTO operations"
            " (operation_id, engine_id, product_id, user_id, node, kind, actor, queue, outcome, finished_at)"
            " SELECT gen_random_uuid(), engine_id, product_id, user_id, node, 'destroy', 'test', 'other', 'succeeded',"
            " clock_timestamp() FROM engines WHERE engine_id = %s",
            engine_id,
        )
        self._platform.query("DELETE FROM port_leases WHERE engine_id = %s", engine_id)
        self._platform.query("DELETE FROM engines WHERE engine_id = %s", engine_id)

    async def kill_member(self) -> None:
        """The member of the warm pool dies."""
        [(engine_id,)] = self._platform.query("SELECT engine_id FROM engines WHERE product_id IS NULL")
        self._process(str(engine_id)).kill()

    async def end(self) -> None:
        """Destroys what there is."""
        if self._taken is not None:
            self._taken.close()
        if self._engine() is not None:
            await self.call("Destroy")
        assert self._engine() is None

    def _engine(self) -> tuple[str, str] | None:
        """Its status and URL."""
        rows = self._platform.query("SELECT status, url FROM engines WHERE user_id = %s", self.user_id)
        return (rows[0][0], rows[0][1]) if rows else None

    def _id(self) -> UUID:
        engine_id: UUID = self._platform.query("SELECT engine_id FROM engines WHERE user_id = %s", self.user_id)[0][0]
        return engine_id

    def _marker(self) -> Path:
        return self._platform.volume(self._id()) / "marker"

    def _process(self, engine_id: str) -> psutil.Process:
        process = process_of(self._platform, engine_id)
        assert process is not None
        return process
