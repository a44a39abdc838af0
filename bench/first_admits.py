"""How long the first admit of a new user takes while the warm pool is full: one user at a time."""

import time
from pathlib import Path

from bench.containers import docker_platform
from bench.installation import admits, register
from september.admission.v1 import admission_service_pb2 as pb
from services.provisioner.settings import BackendKind
from tests.harness import Platform, eventually, running_platform

_POOL = 4
_REFILL_S = 60.0


def measure(database_url: str, directory: Path, users: int, backend: BackendKind) -> list[float]:
    """Milliseconds of each first admit, over gRPC at Admission.

    Args:
        database_url: of an empty database.
        users: are admitted, each an engine of their own from then on.
        backend: what runs them.
    """
    settings = {"ORCH_WARM_POOL_SIZE": str(_POOL)}
    if backend is BackendKind.DOCKER:
        with docker_platform(database_url, directory, **settings) as (platform, _):
            return _admits(platform, users)
    directory.mkdir()
    with running_platform(database_url, directory, **settings) as platform:
        return _admits(platform, users)


def _admits(platform: Platform, users: int) -> list[float]:
    provisioner = platform.provisioner()
    admission = platform.admission(provisioner)
    [product] = register(platform, provisioner, 1)

    def full() -> bool:
        pool = "SELECT count(*) FROM engines WHERE product_id IS NULL AND status = 'running'"
        return bool(platform.query(pool)[0][0] == _POOL)

    times_ms = []
    with admits(admission.address) as admit:
        # The first opens connections, and counts for nothing.
        for number in range(users + 1):
            eventually(full, "the pool is full", _REFILL_S)
            request = pb.AdmitRequest(user_id=f"new-{number}", auto_provision=True)
            begun = time.perf_counter()
            answer = admit(request, product)
            times_ms.append((time.perf_counter() - begun) * 1000)
            assert answer.admitted, answer
    return times_ms[1:]
