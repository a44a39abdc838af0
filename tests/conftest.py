"""Fixtures that all tests share."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings

from services.shared import embedded_postgres
from tests.harness import Clients, Platform, Service, new_database, ports_from, running_platform

pytest_plugins = ["tests.chaos.score_card"]

# These machines are noisy; how long an example takes says nothing.
settings.register_profile("noisy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest goes first, or some processes would wait for it at the end."""

    def seconds(item: pytest.Item) -> int:
        mark = item.get_closest_marker("early")
        return mark.args[0] if mark else 0

    items.sort(key=seconds, reverse=True)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL of the tests' own.

    Not below pytest's directory, which every new run shuts to others again: as root the server
    runs as a user of its own.
    """
    with TemporaryDirectory(prefix="september-") as directory:
        data_dir = Path(directory) / "data"
        yield embedded_postgres.start(data_dir)
        embedded_postgres.stop(data_dir)


@pytest.fixture
def database_url(postgres_url: str) -> str:
    """An empty database."""
    return new_database(postgres_url)


@pytest.fixture
def platform(database_url: str, tmp_path: Path) -> Iterator[Platform]:
    """An installation of the test's own, nothing started yet."""
    with running_platform(database_url, tmp_path, **ports_from(20000)) as platform:
        yield platform


@pytest.fixture(scope="session")
def shared(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Platform, list[Service]]]:
    """One installation for all tests that only need a product of their own: a Provisioner and two Admissions."""
    directory = tmp_path_factory.mktemp("shared")
    with running_platform(new_database(postgres_url), directory, **ports_from(21000)) as platform:
        provisioner = platform.provisioner()
        yield platform, [provisioner, platform.admission(provisioner), platform.admission(provisioner)]


@pytest.fixture
async def clients(shared: tuple[Platform, list[Service]]) -> AsyncIterator[Clients]:
    """Stubs of the shared installation."""
    platform, services = shared
    clients = Clients(platform, *(service.address for service in services))
    yield clients
    await clients.close()


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Clients]]:
    """Makes stubs for services that the test has started itself."""
    made: list[Clients] = []

    def connect(platform: Platform, *services: Service) -> Clients:
        made.append(Clients(platform, *(service.address for service in services)))
        return made[-1]

    yield connect
    for clients in made:
        await clients.close()
