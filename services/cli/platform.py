"""The whole platform on this machine: what is started, in which order, and how it ends."""

import asyncio
import math
import os
import sys
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from services.cli import database, demo, gateway, health
from services.cli.addresses import reachable
from services.cli.failure import failure_with_log
from services.cli.part import Part
from services.cli.progress import StartProgress
from services.cli.settings import UpSettings
from services.cli.var_directory import VarDirectory
from services.provisioner.settings import BackendKind
from services.shared import embedded_postgres
from services.shared.settings import PREFIX

_START_S = 60.0
# How long a part may take to end. The Provisioner first ends its engines.
_PROVISIONER_GRACE_S = 60.0
_ADMISSION_GRACE_S = 20.0
_GATEWAY_GRACE_S = 5.0


@dataclass(frozen=True)
class Platform:
    """Args:
    var: what it keeps.
    settings: of all its parts; this process's environment holds the same.
    progress: shows the start.
    stack: ends the parts, in reverse order of their start.
    watch: fails when a part ends.
    """

    var: VarDirectory
    settings: UpSettings
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

        admission_address = reachable(self.settings.admission_listen)
        provisioner_address = self.settings.provisioner_addr
        gateway_address = reachable(self.settings.gateway_listen)
        config = gateway.render(
            gateway.GatewaySettings(
                listen=self.settings.gateway_listen,
                admission=admission_address,
                provisioner=provisioner_address,
                boot_timeout_s=math.ceil(self.settings.boot_timeout_s),
            )
        )
        envoy = gateway.command(self.var.write("envoy.yaml", config))
        environment = {**os.environ, "ORCH_DATABASE_URL": url}
        without_secrets = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        parts = (
            await self._run("provisioner", _module("services.provisioner"), environment, _PROVISIONER_GRACE_S),
            await self._run("admission", _module("services.admission"), environment, _ADMISSION_GRACE_S),
            await self._run("gateway", envoy, without_secrets, _GATEWAY_GRACE_S),
        )
        signs = (
            health.serving(provisioner_address),
            health.serving(admission_address),
            health.answering(gateway_address),
        )
        await asyncio.wait([self.watch.create_task(sign) for sign in map(self._healthy, parts, signs)])

        admin_key = self.settings.admin_key.get_secret_value()
        platform_key = await asyncio.to_thread(
            demo.platform_key, gateway_address, admin_key, self.var, f"demo_{self.settings.engine_backend}_platform_key"
        )
        return {
            "REST_URL": f"http://{gateway_address}",
            "ADMISSION_ADDR": admission_address,
            "PROVISIONER_ADDR": provisioner_address,
            "PLATFORM_KEY": platform_key,
            "ADMIN_KEY": admin_key,
            "DATABASE_URL": url,
        }

    async def _start_postgres(self) -> str:
        data_dir = self._data_dir()
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

    def _data_dir(self) -> Path:
        # One backend can't run the engines of another: each has a registry of its own.
        backend, default = self.settings.engine_backend, self.var.postgres
        return default if backend is BackendKind.PROCESS else default.with_name(f"{default.name}-{backend}")

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
