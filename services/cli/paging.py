"""Lists that come in pages."""

from typing import Annotated, TypeVar

import grpc
import typer

from september.provisioner.v1.fleet_service_pb2 import (
    ListAuditEventsRequest,
    ListAuditEventsResponse,
    ListEnginesRequest,
    ListEnginesResponse,
)
from september.provisioner.v1.product_service_pb2 import ListProductsRequest, ListProductsResponse
from services.cli.connection import Metadata
from services.cli.output import Output

_LARGEST_PAGE = 1000

Limit = Annotated[int, typer.Option(min=1, max=_LARGEST_PAGE, help="Most to show.")]
All = Annotated[bool, typer.Option("--all", help="Show all, whatever the limit.")]

Request = TypeVar("Request", ListEnginesRequest, ListProductsRequest, ListAuditEventsRequest)
Page = TypeVar("Page", ListEnginesResponse, ListProductsResponse, ListAuditEventsResponse)


async def listed(
    method: "grpc.aio.UnaryUnaryMultiCallable[Request, Page]",
    request: Request,
    metadata: Metadata,
    *,
    limit: int | None = None,
) -> Page:
    """A list from its beginning.

    Args:
        limit: most entries; without it all pages are read, and are one in the answer.
    """
    request.limit = limit or _LARGEST_PAGE
    answer = await method(request, metadata=metadata)
    token = answer.next_page_token
    while limit is None and token:
        request.page_token = token
        page = await method(request, metadata=metadata)
        answer.MergeFrom(page)
        token = page.next_page_token
    if limit is None:
        answer.ClearField("next_page_token")
    return answer


def note_more(output: Output, answer: ListEnginesResponse | ListAuditEventsResponse) -> None:
    """Tells whoever watches if the list is longer than what was shown."""
    if answer.next_page_token:
        output.note("There are more: --all shows them.")
