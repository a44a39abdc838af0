"""`september up`: the whole platform on this machine, in the foreground."""

import asyncio
import os
import secrets
import signal
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Annotated, Any

import typer
from cryptography.fernet import Fernet
from rich.console import Console

from services.cli.addresses import claim, reachable
from services.cli.failure import Failure
from services.cli.gateway import Lane, lane_environment
from services.cli.platform import Platform
from services.cli.progress import StartProgress
from services.cli.settings import UpSettings
from services.cli.var_directory import VarDirectory
from services.provisioner.settings import BackendKind
from services.shared.settings import StorageSettings, file_variables, load, variable

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_SESSION = """
Ready: REST at {rest}, for operators at {operators}; gRPC at {admission} (Admission) and {provisioner} (Provisioner).
Try it from another terminal, in this directory:

  . {environment}
  engine=$(curl -s "$REST_URL/engines/ada/admit" -H "X-Platform-Key: $PLATFORM_KEY" -d '{{"auto_provision":true}}')
  echo "$engine"
  url=$(echo "$engine" | grep -o 'http://[^"]*') key=$(echo "$engine" | grep -o 'sk-sept-[^"]*')
  curl -sN "$url/execute" -H "X-Engine-Key: $key" -d '{{"conversation_id":"c1","message":"hello"}}'

Ctrl-C ends it; data, logs and keys stay in {var}.
"""


def up(
    backend: Annotated[BackendKind | None, typer.Option(help="What runs engines.")] = None,
    lane: Annotated[
        Lane | None, typer.Option(help="Where Admission runs: inside of the gateway, or as a gRPC server behind it.")
    ] = None,
) -> None:
    """Run the whole platform on this machine, until Ctrl-C."""
    console = Console()
    lane = possible(lane, console)
    var = VarDirectory(load(StorageSettings).var_dir)
    with var.exclusive():
        # Left by one that was killed, it would be believed.
        var.environment.unlink(missing_ok=True)
        settings = _prepare_environment(var, backend, lane)
        asyncio.run(_until_signal(_serve(var, settings, lane, console)))


def possible(lane: Lane | None, console: Console) -> Lane:
    """The lane that was asked for; if none was, the fastest that this Python can run.

    Raises:
        Failure: it can't run that.
    """
    if lane is Lane.GRPC or lane_environment() is not None:
        return lane or Lane.FAST
    if lane is Lane.FAST:
        raise Failure("the fast lane needs libpython, which this Python does not have; --lane grpc does without")
    console.print("This Python has no libpython, so Admission runs behind the gateway: --lane grpc.", soft_wrap=True)
    return Lane.GRPC


def _prepare_environment(var: VarDirectory, backend: BackendKind | None, lane: Lane) -> UpSettings:
    """Completes this process's environment, from which the services read their settings."""
    generated = {
        "master_key": lambda: Fernet.generate_key().decode(),
        "admin_key": lambda: secrets.token_urlsafe(32),
    }
    for field, make in generated.items():
        file_variable = file_variables(UpSettings)[field]
        if not {variable(field), file_variable} & os.environ.keys():
            os.environ[file_variable] = str(var.secret_file(field, make))
    if backend is not None:
        os.environ["ORCH_ENGINE_BACKEND"] = backend
    os.environ.setdefault("ORCH_ENGINE_BACKEND", BackendKind.PROCESS)
    os.environ.setdefault("ORCH_WARM_POOL_SIZE", "2")
    os.environ.setdefault("ORCH_DRAIN_S", "0")
    settings = load(UpSettings)
    wanted = {
        "ORCH_GATEWAY_LISTEN": settings.gateway_listen,
        "ORCH_GATEWAY_ADMIN_LISTEN": settings.gateway_admin_listen,
        "ORCH_PROVISIONER_LISTEN": settings.provisioner_listen,
    }
    if lane is Lane.GRPC:
        wanted["ORCH_ADMISSION_LISTEN"] = settings.admission_listen
    addresses = claim(wanted)
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
        # Without a handler the next one would end this process.
        signal.signal(number, signal.SIG_IGN)
    stopped.cancel()
    task.cancel()
    try:
        await task
    except (asyncio.CancelledError, Failure):
        # Ctrl-C also reaches what starts PostgreSQL, and so may look like a failure of it.
        if not stop.is_set():
            raise


async def _serve(var: VarDirectory, settings: UpSettings, lane: Lane, console: Console) -> None:
    """Starts everything and waits until a part ends or this is cancelled; ends everything.

    Raises:
        Failure: something did not start, or a part ended.
    """
    try:
        # The watch ends first: from then on parts end because they are told to.
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as watch:
            with StartProgress(console) as progress:
                announced = await Platform(var, settings, lane, progress, stack, watch).start()
            stack.enter_context(var.announced(announced))
            console.print(
                _SESSION.format(
                    rest=announced["REST_URL"],
                    operators=announced["ADMIN_URL"],
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
