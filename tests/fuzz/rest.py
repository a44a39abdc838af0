"""REST calls that schemathesis makes from docs/openapi.json, as it says and otherwise, held against what it says."""

import asyncio
from itertools import cycle
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.gateway_process import Gateway
from tests.fuzz.targets import DEADLINE_S, Tally, Targets, Verdict
from tests.harness import ROOT

Operation = APIOperation[Any, Any, Any, Any]

_CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# Of the one engine, what leaves it as it is, and ends.
_READS = {"Admit", "GetEngine", "GetEngineHistory"}


def feed(_: asyncio.Runner, targets: Targets, tally: Tally, number: int, seed_: int) -> None:
    """Makes about so many calls, through both gateways in turns."""
    schema = schemathesis.openapi.from_path(ROOT / "docs" / "openapi.json")
    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    gateways = cycle(targets.gateways.values())
    with requests.Session() as session:
        session.trust_env = False

        for operation in operations:

            @seed(seed_)
            @settings(
                max_examples=max(2, number // len(operations)),
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(_cases(operation, targets))
            def some(case: Case[Any]) -> None:
                tally.count(_verdict(case, next(gateways), session, targets), case.as_curl_command())

            some()


def _cases(operation: Operation, targets: Targets) -> st.SearchStrategy[Case[Any]]:
    right = operation.as_strategy(GenerationMode.POSITIVE)
    strategies = [right, operation.as_strategy(GenerationMode.NEGATIVE)]
    for name, known in (("user_id", targets.user_id), ("product_id", targets.changed_id)):
        if f"{{{name}}}" in operation.path and (name != "user_id" or operation.definition.raw["operationId"] in _READS):
            strategies.append(operation.as_strategy(path_parameters={name: known}))
    return st.one_of(strategies)


def _verdict(case: Case[Any], gateway: Gateway, session: requests.Session, targets: Targets) -> Verdict:
    platform_key, admin_key = targets.headers
    admin = case.operation.definition.raw["security"] == [{"adminKey": []}]
    url = f"http://{gateway.operators if admin else gateway.address}"
    try:
        answer = case.call(url, session, headers=dict([admin_key if admin else platform_key]), timeout=DEADLINE_S)
    except requests.RequestException as error:
        return Verdict(repr(error), False)
    try:
        case.validate_response(answer, checks=_CHECKS)
    except FailureGroup as failures:
        return Verdict("; ".join(str(failure) for failure in failures.exceptions), False)
    return Verdict(None, answer.status_code >= 400)
