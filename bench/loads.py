"""Loads from h2load (HTTP/2, and paced) and wrk (HTTP/1.1), and what they say."""

import json
import re
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

REST_LUA = Path(__file__).with_name("rest.lua")
_FRAME_HEADER_BYTES = 5
_MARGIN_S = 120.0
_ONCE_CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run gave.

    Args:
        requests_s: answers a second, right ones alone.
        percentiles_ms: latency by percentile, where it was asked for.
    """

    requests_s: float
    percentiles_ms: dict[str, float]


class WrongAnswers(Exception):
    """What was measured answered something else than it should."""


@dataclass(frozen=True, slots=True)
class Call:
    """What one h2load process asks again and again; it knows one body only.

    Args:
        address: `host:port`.
        paths: asked one after the other.
        headers: besides those of HTTP.
        body: as it is sent; None for a GET.
        answer_bytes: size of the body of a right answer; denials and errors are shorter.
        http1: HTTP/1.1 instead of HTTP/2.
    """

    address: str
    paths: Sequence[str]
    headers: dict[str, str]
    body: bytes | None
    answer_bytes: int
    http1: bool = False


def grpc_call(address: str, method: str, message: bytes, answer: bytes, platform_key: str) -> Call:
    """A unary call, `answer` being the message that comes back."""
    headers = {"content-type": "application/grpc", "te": "trailers", "x-platform-key": platform_key}
    return Call(address, [method], headers, framed(message), _FRAME_HEADER_BYTES + len(answer))


def framed(message: bytes) -> bytes:
    """A message as gRPC sends it: not compressed, its length, itself."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def h2load(
    calls: Sequence[Call], *, concurrency: int, duration_s: float, rate_s: float | None = None, latency: bool = False
) -> Measured:
    """Runs a process for each call, all at once.

    Args:
        concurrency: calls under way at once, over all processes.
        duration_s: seconds.
        rate_s: calls a second over all processes; None for as many as are answered.
        latency: also takes down how long each call took, which costs the generator some.

    Raises:
        WrongAnswers: calls failed, answers were too short to be right, or there were none.
    """
    calls = calls[:concurrency]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        running = []
        for number, call in enumerate(calls):
            command = _h2load_command(call, directory, number, concurrency // len(calls))
            command += ["--duration", f"{duration_s * 1000:.0f}ms"]
            if rate_s is not None:
                connections = int(command[command.index("--clients") + 1])
                command += ["--rps", f"{rate_s / len(calls) / connections:.3f}"]
            if latency:
                command += ["--log-file", str(directory / f"{number}.log")]
            running.append(_start(command, stack))
        outputs = [process.communicate(timeout=duration_s + _MARGIN_S)[0] for process in running]
        requests_s = sum(read_h2load(call, output) for call, output in zip(calls, outputs, strict=True))
        if not requests_s:
            raise WrongAnswers(f"{calls[0].address} answers nothing")
        return Measured(requests_s, _percentiles(directory) if latency else {})


def once(calls: Sequence[Call]) -> None:
    """Asks every path of every call once.

    Raises:
        WrongAnswers: as `h2load`.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        running = []
        for number, call in enumerate(calls):
            command = [*_h2load_command(call, directory, number, _ONCE_CONCURRENCY), "-n", f"{len(call.paths)}"]
            running.append(_start(command, stack))
        for call, process in zip(calls, running, strict=True):
            read_h2load(call, process.communicate(timeout=_MARGIN_S)[0])


def _start(command: Sequence[str], stack: ExitStack) -> subprocess.Popen[str]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _h2load_command(call: Call, directory: Path, number: int, concurrency: int) -> list[str]:
    body, uris = directory / f"{number}.body", directory / f"{number}.uris"
    body.write_bytes(call.body or b"")
    uris.write_text("".join(f"http://{call.address}{path}\n" for path in call.paths))
    # HTTP/1.1 has one call at a time on a connection; of HTTP/2 callers keep one connection.
    spread = ["--h1", "--clients", f"{concurrency}"] if call.http1 else ["--clients", "1", "-m", f"{concurrency}"]
    headers = [option for name, value in call.headers.items() for option in ("-H", f"{name}: {value}")]
    return [
        "h2load", *spread, *headers,
        *(() if call.body is None else ("--data", str(body))),
        *("--input-file", str(uris)),
    ]  # fmt: skip


def read_h2load(call: Call, output: str) -> float:
    """The calls a second that h2load says it has made.

    Raises:
        WrongAnswers: calls failed, or answers were too short to be right.
    """
    rate = re.search(r"^finished in .*, ([\d.]+) req/s", output, re.MULTILINE)
    counts = re.search(r"^requests: .* (\d+) succeeded, (\d+) failed, (\d+) errored", output, re.MULTILINE)
    data = re.search(r"\((\d+)\) data$", output, re.MULTILINE)
    if rate is None or counts is None or data is None:
        raise WrongAnswers(f"h2load: {output[-500:]}")
    succeeded, failed, errored = map(int, counts.groups())
    # An error of gRPC is a success of HTTP, with an empty body. Of a moment, JSON has no trailing noughts.
    if failed or errored or int(data[1]) < 0.98 * succeeded * call.answer_bytes:
        raise WrongAnswers(f"{call.address}: {counts[0]}, {data[1]} bytes, and not {call.answer_bytes} for each")
    return float(rate[1])


def _percentiles(directory: Path) -> dict[str, float]:
    times_us = sorted(
        int(line.rsplit("\t", 1)[1]) for log in directory.glob("*.log") for line in log.read_text().splitlines()
    )
    cuts = statistics.quantiles(times_us, n=1000, method="inclusive")
    return {name: cuts[index - 1] / 1000 for name, index in (("50", 500), ("90", 900), ("99", 990), ("99.9", 999))}


def wrk(address: str, requests: Path, *, concurrency: int, duration_s: float, answer_bytes: int) -> Measured:
    """Posts what `requests` lists, one after the other, on `concurrency` connections.

    Args:
        requests: lines of a path, a tabulator and a platform key.
        duration_s: whole seconds, rounded up.
        answer_bytes: size of the body of a right answer, at least.

    Raises:
        WrongAnswers: there were errors, or answers too short to be right.
    """
    command = ["wrk", "--threads", "1", "--connections", f"{concurrency}", "--duration", f"{-(-duration_s // 1):.0f}s"]
    command += ["--script", str(REST_LUA), f"http://{address}", "--", str(requests)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=duration_s + _MARGIN_S, check=True).stdout
    said = json.loads(output.splitlines()[-1])
    if said["errors"] or said["bytes"] < said["requests"] * answer_bytes:
        raise WrongAnswers(f"{address}: {said}")
    percentiles = {name: value / 1000 for name, value in said["percentiles_us"].items()}
    return Measured(said["requests"] / said["duration_us"] * 1e6, percentiles)
