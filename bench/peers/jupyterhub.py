"""JupyterHub from its package, which solves the nearest problem: a server for each user, looked up and spawned.

Installed when it is first asked for, into an environment of its own; its proxy comes from npm.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path
from secrets import token_hex
from typing import Any

from bench.loads import Call, h2load
from bench.platform import free_address, process
from tests.harness import ROOT

_HOME = ROOT / "build" / "jupyterhub"
_PACKAGES = ("jupyterhub", "jupyter_server", "psycopg[binary]")
_PROXY = "configurable-http-proxy"
_USERS = 1000
_BATCH = 100
_SPAWN_S = 60.0
_PAUSE_S = 0.01

_CONFIG = """\
c.JupyterHub.bind_url = "http://{public}"
c.JupyterHub.hub_bind_url = "http://{hub}"
c.ConfigurableHTTPProxy.api_url = "http://{proxy}"
c.JupyterHub.db_url = {database_url!r}
c.JupyterHub.authenticator_class = "dummy"
c.JupyterHub.spawner_class = "simple"
c.Spawner.args = ["--allow-root"]
c.Authenticator.allow_all = True
c.JupyterHub.log_level = "WARN"
c.JupyterHub.services = [{{"name": "bench", "api_token": {token!r}}}]
c.JupyterHub.load_roles = [
    {{"name": "bench", "scopes": ["admin:users", "admin:servers"], "services": ["bench"]}}
]
"""


def measure(database_url: str, directory: Path, duration_s: float, spawns: int) -> dict[str, float]:
    """Look-ups of a user by REST a second, and the milliseconds until a user's spawned server is ready.

    Args:
        database_url: of an empty database of PostgreSQL.
        duration_s: for which users are looked up, in seconds.
        spawns: one after the other, each of another user.

    Raises:
        RuntimeError, OSError: it can't be installed, does not start, or does not answer.
    """
    _install()
    directory.mkdir()
    public, hub, proxy = (free_address() for _ in range(3))
    token = token_hex(32)
    url = database_url.replace("postgresql:", "postgresql+psycopg:", 1)
    config = directory / "jupyterhub_config.py"
    config.write_text(_CONFIG.format(public=public, hub=hub, proxy=proxy, database_url=url, token=token))
    path = f"{_HOME / 'bin'}:{_HOME / 'node_modules' / '.bin'}:{os.environ['PATH']}"
    command = [str(_HOME / "bin" / "jupyterhub"), "--config", str(config)]
    environment = {"PATH": path, "HOME": str(directory), "PYTHONPATH": ""}
    with process(command, hub, directory / "jupyterhub.log", environment, directory):
        headers = {"Authorization": f"token {token}"}
        names = [f"user-{number:04}" for number in range(_USERS)]
        for first in range(0, _USERS, _BATCH):
            _call(hub, "POST", "/users", headers, {"usernames": names[first : first + _BATCH]})
        paths = [f"/hub/api/users/{name}" for name in names]
        call = Call(hub, paths, headers, None, 1, http1=True)
        looked_up = h2load([call], concurrency=8, duration_s=duration_s)
        spawned = [_spawn(hub, headers, name) for name in names[:spawns]]
    return {"look-ups of a user a second": looked_up.requests_s, "ms for a spawn": statistics.median(spawned)}


def _install() -> None:
    if (_HOME / "installed").exists():
        return
    if shutil.which("npm") is None:
        raise RuntimeError(f"npm is missing, from which JupyterHub's {_PROXY} comes")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(_HOME)],
        [str(_HOME / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *_PACKAGES],
        ["npm", "install", "--silent", "--prefix", str(_HOME), _PROXY],
    ):
        if subprocess.run(command, check=False).returncode:
            raise RuntimeError(f"JupyterHub can't be installed: {' '.join(command)}")
    (_HOME / "installed").touch()


def _spawn(hub: str, headers: Mapping[str, str], name: str) -> float:
    begun = time.perf_counter()
    _call(hub, "POST", f"/users/{name}/server", headers, {})
    while not _call(hub, "GET", f"/users/{name}", headers)["servers"].get("", {}).get("ready"):
        if time.perf_counter() - begun > _SPAWN_S:
            raise RuntimeError("JupyterHub does not spawn")
        time.sleep(_PAUSE_S)
    return (time.perf_counter() - begun) * 1000


def _call(hub: str, method: str, path: str, headers: Mapping[str, str], body: object = None) -> Any:
    connection = HTTPConnection(hub, timeout=_SPAWN_S)
    try:
        connection.request(method, f"/hub/api{path}", None if body is None else json.dumps(body), dict(headers))
        answer = connection.getresponse()
        said = answer.read()
    finally:
        connection.close()
    if answer.status >= 300:
        raise RuntimeError(f"JupyterHub answered {answer.status}: {said.decode()}")
    return json.loads(said or "null")
