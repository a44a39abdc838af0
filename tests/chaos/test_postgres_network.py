"""Between the services and PostgreSQL: a wire cut in silence, and a pooler that lets no notification through."""

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from september.provisioner.v1 import provisioner_service_pb2 as pb
from tests.chaos.load import admit
from tests.chaos.outage import Callers, during
from tests.chaos.own_postgres import OwnPostgres, own_postgres
from tests.harness import Clients, eventually, running_platform
from tests.integration.docker_daemon import missing

Connect = Callable[..., Clients]

# As old as anything may be that Admission knows.
OLDEST_S = 5.0
PORTS = {"ORCH_PORT_MIN": "22500", "ORCH_PORT_MAX": "22999"}


@pytest.mark.long
async def test_through_a_wire_cut_in_silence_running_engines_are_admitted_and_others_told_in_time(
    tmp_path: Path, connect: Connect
) -> None:
    with own_postgres(networked=True) as postgres, running_platform(postgres.url, tmp_path, **PORTS) as platform:
        assert postgres.namespace is not None
        provisioner = platform.provisioner()
        admission = platform.admission(provisioner)
        clients = connect(platform, provisioner, admission)
        callers = Callers(platform, clients, await clients.register(), [clients.admission])
        await callers.open()
        platform.database_url = postgres.direct_url
        async with callers.load(50) as running:
            async with during(postgres.namespace.cut()):
                # In the middle of statements, then without a connection, then when all are known to be lost.
                for _ in range(3):
                    await callers.told()
            # What is tried meanwhile is tried anew after five seconds.
            await callers.recovery_s()
        assert running.outcomes().keys() == {"admitted"}


@contextmanager
def pooler(postgres: OwnPostgres) -> Iterator[str]:
    """Runs PgBouncer before a PostgreSQL, in transaction mode; gives the URL."""
    if shutil.which("pgbouncer") is None:
        missing("no pooler: install the package pgbouncer")
    with tempfile.TemporaryDirectory(prefix="pooler-") as name:
        directory = Path(name)
        directory.chmod(0o777)
        configuration = directory / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host={postgres.data} user=postgres\n[pgbouncer]\npool_mode = transaction\n"
            f"auth_type = any\nlisten_addr =\nunix_socket_dir = {directory}\n"
            # Its version for these does not know `options`; timeouts are the database's own then.
            "ignore_startup_parameters = options\n"
        )
        configuration.chmod(0o644)
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen([*postgres.as_user, "pgbouncer", configuration], stdout=log, stderr=log)
        url = f"{postgres.url.split('?')[0]}?host={directory}&port=6432"

        def answers() -> bool:
            assert process.poll() is None, (directory / "log").read_text()
            try:
                psycopg.connect(url).close()
            except psycopg.OperationalError:
                return False
            return True

        try:
            eventually(answers, "the pooler answers")
            yield url
        finally:
            process.kill()
            process.wait()


async def test_behind_a_pooler_by_transactions_all_works_and_is_known_within_seconds(
    tmp_path: Path, connect: Connect
) -> None:
    with own_postgres() as postgres, pooler(postgres) as url, running_platform(url, tmp_path, **PORTS) as platform:
        # Both bring the schema up to date.
        assert platform.provisioner().terminate() == 0
        provisioner = platform.provisioner()
        clients = connect(platform, provisioner, platform.admission(provisioner))
        product = await clients.register(rate_limit_rpm=600)
        assert (await admit(clients.admission, product, "ann", auto_provision=True)).outcome == "admitted"
        await clients.provisioner.StopEngine(pb.StopEngineRequest(user_id="ann"), metadata=product.metadata)
        async with asyncio.timeout(OLDEST_S):
            while (await admit(clients.admission, product, "ann")).outcome != "engine_sleeping":
                pass
