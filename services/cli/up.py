"""`september up`: the whole platform on this machine, in the foreground."""

import asyncio
import math
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any

import typer
from cryptography.fernet import Fernet
from pydantic import Field
from rich.console import Console

from services.admission.settings import AdmissionSettings
from services.cli import database, demo, gateway, health
from services.cli.addresses import claim, reachable
from services.cli.failure import Failure, failure_with_log
from services.cli.part import Part
from services.cli.progress import StartProgress
from services.cli.var_directory import VarDirectory
from services.provisioner.settings import BackendKind, ProvisionerSettings
from services.shared import embedded_postgres
from services.shared.settings import PREFIX, StorageSettings, load

_START_S = 60.0
# How long a part may take to end. The Provisioner first ends its engines.
_PROVISIONER_GRACE_S = 60.0
_ADMISSION_GRACE_S = 20.0
_GATEWAY_GRACE_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_SESSION = """\
Ready: REST at {rest}, gRPC at {admission} (Admission) and {provisioner} (Provisioner).
Try it from another terminal, in this directory:

  . {environment}
  engine=$(curl -s "$REST_URL/engines/ada/admit" -H "X-Platform-Key: $PLATFORM_KEY" -d '{{"auto_provision":true}}')
  echo "$engine"
  url=$(echo "$engine" | grep -o 'http://[^"]*') key=$(echo "$engine" | grep -o 'sk-sept-[^"]*')
  curl -sN "$url/execute" -H "X-Engine-Key: $key" -d '{{"conversation_id":"c1","message":"hello"}}'

Ctrl-C ends it; data, logs and keys stay in {var}.
"""


class UpSettings(ProvisionerSettings, AdmissionSettings):
    """Settings of all parts: they read them from one environment."""

    gateway_listen: str = Field("127.0.0.1:8080", description="Address that the gateway serves REST and gRPC on.")


def up(backend: Annotated[BackendKind | None, typer.Option(help="What runs engines.")] = None) -> None:
    """Run the whole platform on this machine, until Ctrl-C."""
    var = VarDirectory(load(StorageSettings).var_dir)
    with var.exclusive():
        settings = _prepare_environment(var, backend)
        asyncio.run(_until_signal(_serve(var, settings, Console())))


def _prepare_environment(var: VarDirectory, backend: BackendKind | None) -> UpSettings:
    """Completes this process's environment, from which the services read their settings."""
    generated = {
        "ORCH_MASTER_KEY": ("master_key", lambda: Fernet.generate_key().decode()),
        "ORCH_ADMIN_KEY": ("admin_key", lambda: secrets.token_urlsafe(32)),
    }
    for variable, (name, make) in generated.items():
        if variable not in os.environ:
            os.environ[variable] = var.secret(name, make)
    if backend is not None:
        os.environ["ORCH_ENGINE_BACKEND"] = backend
    os.environ.setdefault("ORCH_ENGINE_BACKEND", BackendKind.PROCESS)
    settings = load(UpSettings)
    addresses = claim(
        {
            "ORCH_GATEWAY_LISTEN": settings.gateway_listen,
            "ORCH_ADMISSION_LISTEN": settings.admission_listen,
            "ORCH_PROVISIONER_LISTEN": settings.provisioner_listen,
        }
    )
    os.environ.update(
        addresses,
        ORCH_PROVISIONER_ADDR=reachable(addresses["ORCH_PROVISIONER_LISTEN"]),
        ORCH_STOP_ENGINES_ON_EXIT="true",
    )
    return load(UpSettings)


async def _until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` until it ends or a signal comes; then lets it end orderly, whatever comes next."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    for number in _SIGNALS:
        loop.remove_signal_handler(number)
        # What is still run to stop PostgreSQL inherits it.
        signal.signal(number, signal.SIG_IGN)
    stopped.cancel()
    task.cancel()
    try:
        await task
    except (asyncio.CancelledError, Failure):
        # Ctrl-C also reaches what starts PostgreSQL, and so may look like a failure of it.
        if not stop.is_set():
            raise


async def _serve(var: VarDirectory, settings: UpSettings, console: Console) -> None:
    """Starts everything and waits until a part ends or this is cancelled; ends everything.

    Raises:
        Failure: something did not start, or a part ended.
    """
    try:
        # The watch ends first: from then on parts end because they are told to.
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as watch:
            with StartProgress(console) as progress:
                announced = await _start(var, settings, progress, stack, watch)
            stack.enter_context(var.announced(announced))
            console.print(
                _SESSION.format(
                    rest=announced["REST_URL"],
                    admission=announced["ADMISSION_ADDR"],
                    provisioner=announced["PROVISIONER_ADDR"],
                    environment=var.environment,
                    var=var.path,
                ),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            stack.callback(console.print, "Stopping")
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


async def _start(
    var: VarDirectory, settings: UpSettings, progress: StartProgress, stack: AsyncExitStack, watch: asyncio.TaskGroup
) -> dict[str, str]:
    """Starts the parts; `stack` ends them in reverse order. Returns what callers need to know."""

    async def run(name: str, command: Sequence[str], environment: Mapping[str, str], grace_s: float) -> Part:
        part = await Part.start(name, command, environment, var.log(name))
        stack.push_async_callback(part.stop, grace_s)
        watch.create_task(part.watch())
        return part

    with progress.part("postgresql"):
        url = settings.database_url or await _start_embedded(var, stack, watch)
        await database.bring_up_to_date(url)
    os.environ["ORCH_DATABASE_URL"] = url

    admission_address = reachable(settings.admission_listen)
    provisioner_address = settings.provisioner_addr
    gateway_address = reachable(settings.gateway_listen)
    config = var.write(
        "envoy.yaml",
        gateway.render(
            gateway.GatewaySettings(
                listen=settings.gateway_listen,
                admission=admission_address,
                provisioner=provisioner_address,
                boot_timeout_s=math.ceil(settings.boot_timeout_s),
            )
        ),
    )
    without_secrets = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    python = (sys.executable, "-m")
    provisioner = await run("provisioner", [*python, "services.provisioner"], os.environ, _PROVISIONER_GRACE_S)
    admission = await run("admission", [*python, "services.admission"], os.environ, _ADMISSION_GRACE_S)
    envoy = await run("gateway", gateway.command(config), without_secrets, _GATEWAY_GRACE_S)

    async def healthy(part: Part, answer: Awaitable[None]) -> None:
        with progress.part(part.name):
            await part.healthy(answer, _START_S)

    await asyncio.gather(
        healthy(provisioner, health.serving(provisioner_address)),
        healthy(admission, health.serving(admission_address)),
        healthy(envoy, health.answering(gateway_address)),
    )
    admin_key = settings.admin_key.get_secret_value()
    return {
        "REST_URL": f"http://{gateway_address}",
        "ADMISSION_ADDR": admission_address,
        "PROVISIONER_ADDR": provisioner_address,
        "PLATFORM_KEY": await asyncio.to_thread(demo.platform_key, gateway_address, admin_key, var),
        "ADMIN_KEY": admin_key,
        "DATABASE_URL": url,
    }


async def _start_embedded(var: VarDirectory, stack: AsyncExitStack, watch: asyncio.TaskGroup) -> str:
    starting = asyncio.create_task(asyncio.to_thread(database.start_embedded, var))

    async def stop() -> None:
        # A start can't be interrupted: what it makes would be left.
        await asyncio.gather(starting, return_exceptions=True)
        await asyncio.to_thread(embedded_postgres.stop, var.postgres)

    async def watched() -> None:
        while await asyncio.to_thread(embedded_postgres.is_running, var.postgres):  # noqa: ASYNC110 - no child of ours
            await asyncio.sleep(1)
        raise failure_with_log("PostgreSQL has ended", var.postgres / "log")

    stack.push_async_callback(stop)
    url = await asyncio.shield(starting)
    watch.create_task(watched())
    return url
