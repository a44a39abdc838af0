"""Admission inside of the gateway: Envoy's dynamic module loads `services.admission.lane:app`."""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from services.admission.app import core
from services.admission.asgi import AdmissionApp, App, Served
from services.admission.asgi_tracing import TracedApp
from services.admission.calls import SERVICE, Method
from services.admission.settings import AdmissionSettings
from services.shared import log
from services.shared.errors import BootTimeout, ServiceError, Unavailable
from services.shared.settings import load, variable

# As deploy/envoy/envoy.yaml has it for the routes of other services; a boot may be undone before it is answered.
_QUICK_S = 15.0
_AFTER_BOOT_S = 60.0


def served(methods: Mapping[str, Method], boot_timeout_s: float) -> dict[str, Served]:
    """Methods by their gRPC paths, with the time that each may take.

    Args:
        methods: by name.
        boot_timeout_s: how long an engine may take to become healthy, in seconds.
    """
    by_path = {f"/{SERVICE}/{name}": Served(method, _QUICK_S, _unavailable) for name, method in methods.items()}
    by_path[f"/{SERVICE}/Admit"] = Served(methods["Admit"], boot_timeout_s + _AFTER_BOOT_S, _boot_timeout)
    return by_path


def _unavailable() -> ServiceError:
    return Unavailable("the service is not available, try again")


def _boot_timeout() -> ServiceError:
    return BootTimeout("the engine was not healthy in time")


@asynccontextmanager
async def _opened() -> AsyncIterator[Mapping[str, Served]]:
    settings = load(AdmissionSettings)
    log.configure("admission", settings.log_level)
    async with core(settings) as calls:
        yield served(calls.methods, settings.boot_timeout_s)


app: App = AdmissionApp(_opened)
if variable("traces_addr") in os.environ:
    app = TracedApp(app)
