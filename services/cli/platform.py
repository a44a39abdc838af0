"""The whole platform on this machine: what is started, in which order, and how it ends."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from services.cli import database, demo, gateway, health
from services.cli.addresses import reachable
from services.cli.drain import DRAIN_S, GRACE_S, drain
from services.cli.failure import failure_with_log
from services.cli.gateway import Lane
from services.cli.part import Part
from services.cli.progress import StartProgress
from services.cli.rest import Listener
from services.cli.settings import UpSettings
from services.cli.var_directory import VarDirectory
from services.shared import embedded_postgres

_START_S = 60.0
# How long a part may take to end. The Provisioner first ends its engines.
_PROVISIONER_GRACE_S = 60.0
_ADMISSION_GRACE_S = 25.0


@dataclass(frozen=True)
class Platform:
    """Args:
    var: what it keeps.
    settings: of all its parts; this process's environment holds the same.
    lane: where Admission runs.
    progress: shows the start.
    stack: ends the parts, in reverse order of their start.
    watch: fails when a part ends.
    """

    var: VarDirectory
    settings: UpSettings
    lane: Lane
    progress: StartProgress
    stack: AsyncExitStack
    watch: asyncio.TaskGroup

    async def start(self) -> dict[str, str]:
        """Starts everything; returns, as variables of a shell, what callers need.

        Raises:
            Failure: something does not start.
        """
        with self.progress.part("postgresql"):
            url = self.settings.database_url or await self._start_postgres()
            await database.bring_up_to_date(url)

        # Given, all read it where it stands.
        environment = {**os.environ} if self.settings.database_url else {**os.environ, "ORCH_DATABASE_URL": url}
        provisioner_address = self.settings.provisioner_addr
        certificate = self.settings.gateway_cert_file
        listener = Listener(reachable(self.settings.gateway_listen), certificate)
        operators = Listener(reachable(self.settings.gateway_admin_listen), certificate)
        identity = self.settings.identity()
        provisioner = await self._run("provisioner", _module("services.provisioner"), environment, _PROVISIONER_GRACE_S)
        starting = [(provisioner, health.serving(provisioner_address, "provisioner", identity))]
        if self.lane is Lane.GRPC:
            admission_address = reachable(self.settings.admission_listen)
            admission = await self._run("admission", _module("services.admission"), environment, _ADMISSION_GRACE_S)
            starting.append((admission, health.serving(admission_address, "admission", identity)))
        else:
            admission_address = listener.address
        starting.append((await self._run_gateway(admission_address, environment), health.answering(listener)))
        await asyncio.wait([self.watch.create_task(self._healthy(part, sign)) for part, sign in starting])

        admin_key = self.settings.admin_key.get_secret_value()
        secret = f"demo_{self.settings.engine_backend}_platform_key"
        platform_key = await asyncio.to_thread(demo.platform_key, listener, operators, admin_key, self.var, secret)
        return {
            "REST_URL": listener.url,
            "ADMIN_URL": operators.url,
            "ADMISSION_ADDR": admission_address,
            "PROVISIONER_ADDR": provisioner_address,
            "PLATFORM_KEY": platform_key,
            "ADMIN_KEY": admin_key,
            "DATABASE_URL": url,
        }

    async def _start_postgres(self) -> str:
        data_dir = self.var.registry(self.settings.engine_backend)
        starting = asyncio.create_task(asyncio.to_thread(database.start_embedded, data_dir, self.var.log("postgresql")))

        async def stop() -> None:
            # A start can't be interrupted: what it makes would be left.
            await asyncio.gather(starting, return_exceptions=True)
            await asyncio.to_thread(embedded_postgres.stop, data_dir)

        async def watch() -> None:
            while await asyncio.to_thread(embedded_postgres.is_running, data_dir):  # noqa: ASYNC110 - no child of ours
                await asyncio.sleep(1)
            raise failure_with_log("PostgreSQL has ended", data_dir / "log")

        self.stack.push_async_callback(stop)
        url = await asyncio.shield(starting)
        self.watch.create_task(watch())
        return url

    async def _run_gateway(self, admission_address: str, environment: Mapping[str, str]) -> Part:
        admission = admission_address if self.lane is Lane.GRPC else None
        settings = gateway.settings_of(self.settings, admission, self.var)
        command, admin_file = gateway.prepare(settings, self.var)
        part = await self._run("gateway", command, gateway.environment(self.lane, environment), GRACE_S)
        self.stack.push_async_callback(asyncio.to_thread, drain, admin_file, DRAIN_S)
        return part

    async def _run(self, name: str, command: Sequence[str], environment: Mapping[str, str], grace_s: float) -> Part:
        part = await Part.start(name, command, environment, self.var.log(name))
        self.stack.push_async_callback(part.stop, grace_s)
        self.watch.create_task(part.watch())
        return part

    async def _healthy(self, part: Part, sign: Awaitable[None]) -> None:
        with self.progress.part(part.name):
            await part.healthy(sign, _START_S)


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]
