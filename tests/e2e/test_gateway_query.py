"""Query parameters of REST calls: which ones a method takes, and that nothing slips by under another name."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.message import Message

from september.provisioner.v1 import fleet_service_pb2 as fleet_pb
from september.provisioner.v1 import product_service_pb2 as product_pb
from services.cli.gateway import Lane
from tests.e2e.gateway_calls import METHODS, Method
from tests.e2e.gateway_process import Gateway
from tests.e2e.gateway_services import Services, gateway_and_services

pytestmark = pytest.mark.asyncio(loop_scope="module")

# The only methods that take a query: path, query, and the request that comes of it.
ACCEPTED: list[tuple[str, str, Message]] = [
    ("/engines", "", fleet_pb.ListEnginesRequest()),
    ("/engines", "limit=1000", fleet_pb.ListEnginesRequest(limit=1000)),
    ("/engines", "limit=0&offset=-1", fleet_pb.ListEnginesRequest(limit=0, offset=-1)),
    ("/engines", "limit=%31%30", fleet_pb.ListEnginesRequest(limit=10)),
    ("/engines", "&limit=5&&", fleet_pb.ListEnginesRequest(limit=5)),
    ("/engines", "status=&page_token=", fleet_pb.ListEnginesRequest()),
    ("/engines", "status=no+such%20status%26%3D", fleet_pb.ListEnginesRequest(status="no+such status&=")),
    (
        "/engines",
        "page_token=t-_&offset=3&limit=7&status=running",
        fleet_pb.ListEnginesRequest(status="running", limit=7, offset=3, page_token="t-_"),
    ),
    ("/engines/q/history", "limit=7", fleet_pb.GetEngineHistoryRequest(user_id="q", limit=7)),
    (
        "/audit",
        "action=stop&user_id=a%2Fb%F0%9F%98%80&product_id=p&limit=7&page_token=t",
        fleet_pb.ListAuditEventsRequest(action="stop", user_id="a/b😀", product_id="p", limit=7, page_token="t"),
    ),
    ("/products", "limit=7&page_token=t", product_pb.ListProductsRequest(limit=7, page_token="t")),
]
NO_PARAMETER = "this call takes no query parameters"
# Query of a list, and what the gateway says to it.
REFUSED = {
    "x=1": "unknown query parameter x",
    "x": "unknown query parameter x",
    "limit=5&x=1": "unknown query parameter x",
    "user_id=bob": "unknown query parameter user_id",
    "LIMIT=5": "unknown query parameter LIMIT",
    "pageToken=t": "unknown query parameter pageToken",
    "page%5Ftoken=t": "unknown query parameter page%5Ftoken",
    "limit.x=5": "unknown query parameter limit",
    "engines.url=5": "unknown query parameter engines",
    "limit[]=5": "unknown query parameter limit",
    "x%22y=1": "unknown query parameter x%22y",
    "=5": "unknown query parameter ",
    "limit": "limit has no value",
    "limit=": "limit has an invalid value",
    "limit=abc": "limit has an invalid value",
    "limit=1e1": "limit has an invalid value",
    "limit=1e9": "limit has an invalid value",
    "limit=1.0": "limit has an invalid value",
    "limit=1.5": "limit has an invalid value",
    "limit=%205": "limit has an invalid value",
    "limit=0x10": "limit has an invalid value",
    "limit=null": "limit has an invalid value",
    "limit=true": "limit has an invalid value",
    "limit=NaN": "limit has an invalid value",
    "limit=%22": "limit has an invalid value",
    "limit=%D9%A3": "limit has an invalid value",
    "limit=1;page_token=2": "limit has an invalid value",
    "limit=2147483648": "limit has an invalid value",
    "limit=99999999999": "limit has an invalid value",
    "limit=1&limit=2": "limit is given more than once",
    "limit=1&limit=1": "limit is given more than once",
    "page_token=a&limit=1&page_token=b": "page_token is given more than once",
    "page_token=%ff": "the path or the query is not percent-encoded UTF-8",
    "page_token=%": "the path or the query is not percent-encoded UTF-8",
}
TAKES_SOME = {"ListEngines", "GetEngineHistory", "ListAuditEvents", "ListProducts"}
TAKES_NONE = [method for name, method in METHODS.items() if name not in TAKES_SOME]


@dataclass(frozen=True)
class Served:
    gateway: Gateway
    services: Services

    def calls(self) -> list[Any]:
        return [call.request for calls in self.services.calls.values() for call in calls]

    async def refused(self, verb: str, target: str, body: bytes | None = None) -> str:
        """The message of the refusal, which has reached no service."""
        self.services.calls.clear()
        status, code, message = (await self.gateway.rest(verb, target, body)).own_error()
        assert (status, code) == (400, "INVALID_REQUEST")
        assert not self.calls()
        return message


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=Lane)
async def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    lane: Lane = request.param
    directory = tmp_path_factory.mktemp("gateway")
    async with gateway_and_services(lane, directory) as (gateway, services):
        yield Served(gateway, services)


@pytest.mark.parametrize(("path", "query", "request_"), ACCEPTED, ids=[f"{path}?{q}" for path, q, _ in ACCEPTED])
async def test_parameters_reach_the_service(served: Served, path: str, query: str, request_: Message) -> None:
    served.services.calls.clear()
    assert (await served.gateway.rest("GET", f"{path}?{query}")).status == 200
    assert served.calls() == [request_]


@pytest.mark.parametrize("path", ["/engines", "/audit", "/products"])
async def test_a_parameter_that_is_unknown_malformed_or_repeated_is_refused_by_name(served: Served, path: str) -> None:
    refused = dict(REFUSED)
    if path == "/audit":
        del refused["user_id=bob"]
    assert {query: await served.refused("GET", f"{path}?{query}") for query in refused} == refused


@pytest.mark.parametrize("name", ["user_id", "userId", "user%5Fid", "%75ser_id"])
@pytest.mark.parametrize("query", ["{}=bob", "limit=5&{}=bob", "{}=bob&limit=5", "{}=ada", "{}="])
async def test_no_parameter_overrides_the_path(served: Served, name: str, query: str) -> None:
    message = await served.refused("GET", f"/engines/ada/history?{query.format(name)}")
    assert message == f"unknown query parameter {name}"


@pytest.mark.parametrize("method", TAKES_NONE, ids=lambda method: method.name)
async def test_a_method_without_parameters_takes_none(served: Served, method: Method) -> None:
    verb, path, body = method.rest_call("q")
    assert await served.refused(verb, f"{path}?", body) == NO_PARAMETER
    assert await served.refused(verb, f"{path}?{method.key_field or 'x'}", body) == NO_PARAMETER
    assert await served.refused(verb, f"{path}?no_such=1", body) == "unknown query parameter no_such"
    if method.key_field:
        assert await served.refused(verb, f"{path}?{method.key_field}=other") == NO_PARAMETER


async def test_parameters_of_an_unknown_path_do_not_make_it_known(served: Served) -> None:
    for target in ("/nowhere?limit=1&limit=2", "/engines/?x", "/Engines?limit=abc"):
        assert (await served.gateway.rest("GET", target)).own_error()[:2] == (404, "ROUTE_NOT_FOUND")
