"""The dependency rule: `__main__` -> app -> servicers, loops, store, backends, clients -> use cases -> domain."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "services").rglob("*.py"))
# What talks gRPC or knows the gateway's contract.
GENERATED_ALLOWED = ("servicer", "calls", "servicers.", "provisioner_client", "grpc_server")
SERVED = ("app", "servicers", "servicer", "calls", "loops", "store")
EDGES = (
    "servicers",
    "servicer",
    "calls",
    "loops",
    "store",
    "backends",
    "registry_sql",
    "ratelimit_sql",
    "provisioner_client",
)
USE_CASES = ("fleet", "lifecycle", "products", "execution", "admit", "registry", "ratelimit", "ratelimit_share")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import path = file path"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_follow_the_rule(path: Path) -> None:
    name = module_name(path)
    _, service, *rest = (*name.split("."), "", "")
    part = rest[0]
    for imported in imports(path):
        if imported.startswith("services."):
            _, other, *inside = (*imported.split("."), "", "")
            if service not in ("shared", "cli"):
                assert other in (service, "shared"), f"{name} imports another service: {imported}"
            if service == "shared":
                assert other == "shared", f"{name} imports a service: {imported}"
            if other == service and part == "domain":
                assert inside[0] == "domain", f"the domain imports {imported}"
            if other == service and part in USE_CASES:
                assert inside[0] not in ("app", "servicers", "servicer", "calls", "loops", "store"), (
                    f"{name}: {imported}"
                )
            if other == service and part in EDGES:
                assert inside[0] != "app", f"{name} imports {imported}"
        if imported.startswith("september.") and service != "cli":
            allowed = part == "app" or any(allowed in f"{name}." for allowed in GENERATED_ALLOWED)
            assert allowed, f"{name} imports generated code: {imported}"


def test_only_backends_know_docker() -> None:
    users = {module_name(p) for p in MODULES if any(i.split(".")[0] == "docker" for i in imports(p))}
    assert users
    assert all(user.startswith("services.provisioner.backends.") for user in users), users


def test_modules_stay_small() -> None:
    sizes = {module_name(p): len(p.read_text().splitlines()) for p in MODULES}
    assert {name: size for name, size in sizes.items() if size > 400} == {}
