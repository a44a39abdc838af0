"""A Docker daemon of the test's own, to be killed and started again beside the machine's."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
from docker import APIClient
from docker.types import IPAMConfig, IPAMPool

from tests.disk import make_disk
from tests.harness import eventually
from tests.subnets import numbered


class OwnDockerd:
    """Shares nothing with the machine's daemon but the kernel: it leaves the packet filter alone, and
    reaches containers by proxies.

    Args:
        directory: for all that it keeps; a short path, for its sockets.
        live_restore: its containers outlive it.
    """

    def __init__(self, directory: Path, *, live_restore: bool = False) -> None:
        self.directory = directory
        self._live_restore = live_restore
        self.data = directory / "data"
        self.address = f"unix://{directory}/socket"
        self.bridges: list[str] = []

    def open(self) -> None:
        """Starts it, and makes a network for engines."""
        # Told to have no bridge, or where to take addresses from, a daemon removes the machine's bridge.
        number = numbered("ip", "link", "add", "own-{}-0", "type", "bridge")
        self.network = f"own-{number}"
        self.bridges = default, engines = [f"{self.network}-0", f"{self.network}-1"]
        subnet = f"10.213.{number}"
        subprocess.run(["ip", "address", "add", f"{subnet}.1/25", "dev", default], check=True)
        self.start()
        api = self.client()
        api.create_network(
            self.network,
            driver="bridge",
            options={"com.docker.network.bridge.name": engines},
            ipam=IPAMConfig(pool_configs=[IPAMPool(f"{subnet}.128/25")]),
        )
        api.close()

    def start(self) -> None:
        """Starts it; returns once it answers."""
        options = {
            "data-root": self.data,
            "exec-root": self.directory / "exec",
            "pidfile": self.directory / "pid",
            "host": self.address,
            "bridge": self.bridges[0],
            "iptables": "false",
            "ip-masq": "false",
            "live-restore": str(self._live_restore).lower(),
        }
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["dockerd", *(f"--{name}={value}" for name, value in options.items())],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        eventually(self.answers, "dockerd answers", 60)

    def answers(self) -> bool:
        assert self.process.poll() is None, (self.directory / "log").read_text()
        return subprocess.run(["docker", "--host", self.address, "info"], capture_output=True).returncode == 0

    def client(self) -> APIClient:
        return APIClient(self.address, version="auto", timeout=60)

    def kill(self) -> None:
        """Kills it; returns when its containerd, which does not outlive it, has ended as well."""
        containerd = self.containerd()
        self.process.kill()
        self.process.wait()
        eventually(lambda: not containerd.is_running(), "containerd has ended")

    def containerd(self) -> psutil.Process:
        return psutil.Process(int((self.directory / "exec" / "containerd" / "containerd.pid").read_text()))

    def load(self, image: str) -> None:
        """Brings an image of the machine's daemon in."""
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as save:
            subprocess.run(
                ["docker", "--host", self.address, "load"], stdin=save.stdout, check=True, stdout=subprocess.DEVNULL
            )

    def lose(self, container: str) -> None:
        """Lets a container die unseen: the daemon goes on calling it running."""
        api = self.client()
        process = psutil.Process(api.inspect_container(container)["State"]["Pid"])
        api.close()
        shim = process.parent()
        assert shim is not None
        for witness in (self.containerd(), shim, process):
            witness.kill()

    def close(self) -> None:
        """Ends it with all that it runs, and takes back what the kernel holds for it and for killed ones.

        Whatever of it there is: it may never have come up.
        """
        try:
            if hasattr(self, "process"):
                self._end()
        finally:
            mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
            for mount in reversed([mount for mount in mounts if mount.startswith(f"{self.directory}/")]):
                subprocess.run(["umount", "--lazy", mount], check=True)
            for bridge in self.bridges:
                subprocess.run(["ip", "link", "delete", bridge], check=False, capture_output=True)

    def _end(self) -> None:
        try:
            if self.process.poll() is not None:
                self.start()  # Nobody else can end its containers.
            api = self.client()
            for container in api.containers(all=True):
                api.remove_container(container["Id"], force=True)
            api.close()
        finally:
            self.process.terminate()
            self.process.wait(60)


@contextmanager
def own_dockerd(*, megabytes: int | None = None, live_restore: bool = False) -> Iterator[OwnDockerd]:
    """Runs one within the block.

    Args:
        megabytes: room on its disk.
        live_restore: its containers outlive it.
    """
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="own-dockerd-"))
        stack.callback(shutil.rmtree, directory)
        dockerd = OwnDockerd(directory, live_restore=live_restore)
        stack.callback(dockerd.close)
        if megabytes is not None:
            dockerd.data.mkdir()
            make_disk(dockerd.data, megabytes)
        dockerd.open()
        yield dockerd
