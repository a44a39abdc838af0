"""Generates from `proto/`, and from the code itself, all that is committed and never edited.

- `gen/python/`: messages and services, with type stubs;
- `deploy/envoy/descriptor.binpb`: what the JSON transcoder reads;
- `deploy/envoy/errors.lua`: error code -> HTTP status, for the gateway;
- `docs/errors.md`: the error table for readers;
- `docs/openapi.json`: the REST calls, for tools;
- `docs/cli.md`: the commands of `september`;
- `docs/api.md`, `docs/configuration.md`, `docs/metrics.md`, `docs/lifecycle.svg`: methods, settings, metrics,
  transitions.

The protos of googleapis come from the installed wheel. buf lints and builds; the
code generator is the protoc inside grpcio-tools, because the gRPC plugin for
Python is part of it and exists nowhere as a program of its own.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
GOOGLEAPIS = ROOT / "build" / "googleapis"
# Envoy turns `grpc-status-details-bin` into JSON only if it knows the types inside.
ERROR_DETAILS = GOOGLEAPIS / "google" / "rpc" / "error_details.proto"


def copy_googleapis() -> None:
    """Lays the wheel's `google/api` and `google/rpc` protos where buf finds them."""
    shutil.rmtree(GOOGLEAPIS, ignore_errors=True)
    for file in metadata.files("googleapis-common-protos") or []:
        if file.suffix == ".proto" and file.parts[:2] in (("google", "api"), ("google", "rpc")):
            target = GOOGLEAPIS / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), target)


def run(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def generate_python(image: Path) -> None:
    """Writes `gen/python` from the compiled protos in `image`."""
    out = ROOT / "gen" / "python"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    protos = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    bin_dir = Path(sys.executable).parent
    run(
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--descriptor_set_in={image}",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet,only_async:{out}",
        *protos,
    )
    # Without a service a gRPC module is empty.
    for path in out.rglob("*_pb2_grpc.py"):
        if "class " not in path.read_text():
            path.unlink()
            path.with_suffix(".pyi").unlink(missing_ok=True)


def error_rows() -> Sequence[tuple[str, int, str, str]]:
    """The error table: code, HTTP status, gRPC code, description; in the proto's order."""
    sys.path.insert(0, str(ROOT / "gen" / "python"))
    from google.rpc import code_pb2

    from september.errors.v1 import errors_pb2

    image = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "build" / "image.binpb").read_bytes())
    file = next(f for f in image.file if f.name == "september/errors/v1/errors.proto")
    # 5, 0, 2, n: path in the source info of value n of the file's first enum.
    comments = {
        tuple(location.path): " ".join(location.leading_comments.split()) for location in file.source_code_info.location
    }
    rows = []
    for index, value in enumerate(errors_pb2.ErrorCode.DESCRIPTOR.values):
        if value.number:
            mapping = value.GetOptions().Extensions[errors_pb2.mapping]
            name = value.name.removeprefix("ERROR_CODE_")
            grpc_code = code_pb2.Code.Name(mapping.grpc_code)
            rows.append((name, mapping.http_status, grpc_code, comments[5, 0, 2, index]))
    return rows


def generate_error_tables(rows: Sequence[tuple[str, int, str, str]]) -> None:
    lua = "".join(f'  {name} = "{http}",\n' for name, http, _, _ in rows)
    (ROOT / "deploy" / "envoy" / "errors.lua").write_text(
        "-- Generated from proto/september/errors/v1/errors.proto by `make gen`; do not edit.\n"
        f"HTTP_STATUS = {{\n{lua}}}\n"
    )
    table = "".join(f"| `{name}` | {http} | {grpc} | {text} |\n" for name, http, grpc, text in rows)
    (ROOT / "docs" / "errors.md").write_text(
        "<!-- Generated from proto/september/errors/v1/errors.proto by `make gen`; do not edit. -->\n"
        "# Errors\n\n"
        'REST answers every error with `{"error":{"code":"…","message":"…"}}`. In gRPC the same error is a\n'
        "`google.rpc.Status` whose `ErrorInfo` has the code as its `reason` and `platform.september` as its\n"
        "`domain`; where waiting helps, a `RetryInfo` (REST: `Retry-After`) says how long.\n\n"
        "| code | HTTP | gRPC | when |\n|---|---|---|---|\n" + table
    )


def main() -> None:
    copy_googleapis()
    buf = str(Path(sys.executable).parent / "buf")
    image = ROOT / "build" / "image.binpb"
    run(buf, "build", "-o", str(image))
    generate_python(image)
    run(
        buf, "build", "--exclude-source-info",
        "--path", "proto/september", "--path", str(ERROR_DETAILS.relative_to(ROOT)),
        "-o", "deploy/envoy/descriptor.binpb",
    )  # fmt: skip
    generate_error_tables(error_rows())
    # In a process of its own: what it imports has just been written.
    run(sys.executable, "-m", "tools.cli_docs")
    run(sys.executable, "-m", "tools.reference")
    run(sys.executable, "-m", "tools.openapi")


if __name__ == "__main__":
    main()
