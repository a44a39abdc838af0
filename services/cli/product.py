"""`september product`: products, their keys and policies, for operators."""

import re
from typing import Annotated, NamedTuple, Self

import typer
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct

from september.provisioner.v1 import product_service_pb2 as pb
from services.cli.command import command, whole_number
from services.cli.connection import Connection
from services.cli.output import Output
from services.cli.paging import listed
from services.shared.errors import ProductNotFound, RemoteError

app = typer.Typer(help="Products, their keys and policies, for operators.", no_args_is_help=True)

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_POLICY = ("max_engines", "rate_limit_rpm", "allowed_images", "idle_sleep_after_s", "max_keep_awake_s")
_PRODUCT = ("product.product_id", "product.slug", *(f"product.policy.{field}" for field in _POLICY),
            "product.created_at", "product.disabled_at")  # fmt: skip


class NumberOrNone(NamedTuple):
    """A number, or the absence of one as somebody asked for it."""

    number: int | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `N` or `none`."""
        return cls(None if text == "none" else whole_number(text))


Named = Annotated[str, typer.Argument(metavar="PRODUCT", help="Slug or UUID of the product.")]
MaxEngines = Annotated[
    int | None, typer.Option(parser=whole_number, metavar="N", help="Most engines, in all states together.")
]
RateLimit = Annotated[
    NumberOrNone | None,
    typer.Option(parser=NumberOrNone.parse, metavar="N|none", help="Most admits in any 60 seconds."),
]
AllowImages = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-image",
        metavar="GLOB",
        help="Images that engines may run; may be repeated. `none` leaves the platform's own with any tag.",
    ),
]
IdleSleep = Annotated[
    NumberOrNone | None,
    typer.Option(
        parser=NumberOrNone.parse, metavar="N|none", help="Seconds without work after which an engine is put to sleep."
    ),
]
MaxKeepAwake = Annotated[
    int | None,
    typer.Option(parser=whole_number, metavar="N", help="Most seconds for which an admit may keep an engine awake."),
]


@command(app, idempotency_key=True)
async def register(
    connection: Connection,
    output: Output,
    slug: Annotated[str, typer.Argument(help="Unique name of the product.")],
    max_engines: Annotated[
        int, typer.Option(parser=whole_number, metavar="N", help="Most engines, in all states together.")
    ],
    rate_limit_rpm: RateLimit = None,
    allow_image: AllowImages = None,
    idle_sleep_after_s: IdleSleep = None,
    max_keep_awake_s: MaxKeepAwake = None,
) -> None:
    """Register a product, and show its platform key this once."""
    policy = _named(max_engines, rate_limit_rpm, allow_image, idle_sleep_after_s, max_keep_awake_s)
    async with connection.products() as products:
        answer = await products.RegisterProduct(
            pb.RegisterProductRequest(slug=slug, policy=ParseDict(policy, Struct())), metadata=connection.admin_key()
        )
    output.record(answer)


@command(app, "list")
async def list_(connection: Connection, output: Output) -> None:
    """List all products."""
    async with connection.products() as products:
        answer = await listed(products.ListProducts, pb.ListProductsRequest(), connection.admin_key())
    output.table(answer, answer.products, "slug", "product_id", "policy.max_engines", "policy.rate_limit_rpm",
                 "created_at", "disabled_at")  # fmt: skip


@command(app)
async def get(connection: Connection, output: Output, product: Named) -> None:
    """Show a product and its policy."""
    product_id = await find(connection, product)
    async with connection.products() as products:
        answer = await products.GetProduct(pb.GetProductRequest(product_id=product_id), metadata=connection.admin_key())
    output.record(answer, *_PRODUCT)


@command(app, idempotency_key=True)
async def policy(
    connection: Connection,
    output: Output,
    product: Named,
    max_engines: MaxEngines = None,
    rate_limit_rpm: RateLimit = None,
    allow_image: AllowImages = None,
    idle_sleep_after_s: IdleSleep = None,
    max_keep_awake_s: MaxKeepAwake = None,
) -> None:
    """Show a product's policy, or change the fields that are named.

    The others are written as they were read just before.
    """
    named = _named(max_engines, rate_limit_rpm, allow_image, idle_sleep_after_s, max_keep_awake_s)
    product_id = await find(connection, product)
    async with connection.products() as products:
        current = await products.GetProduct(
            pb.GetProductRequest(product_id=product_id), metadata=connection.admin_key()
        )
        answer = pb.UpdatePolicyResponse(policy=current.product.policy)
        if named:
            current_fields = MessageToDict(
                current.product.policy, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
            fields = ParseDict({**current_fields, **named}, Struct())
            answer = await products.UpdatePolicy(
                pb.UpdatePolicyRequest(product_id=product_id, policy=fields), metadata=connection.admin_key()
            )
    output.record(answer, *(f"policy.{field}" for field in _POLICY))


@command(app, idempotency_key=True)
async def rotate_key(
    connection: Connection,
    output: Output,
    product: Named,
    grace_s: Annotated[
        int, typer.Option(parser=whole_number, metavar="N", help="Seconds for which the old keys are still taken.")
    ] = 0,
) -> None:
    """Give a product a new platform key, and show it this once."""
    product_id = await find(connection, product)
    async with connection.products() as products:
        answer = await products.RotatePlatformKey(
            pb.RotatePlatformKeyRequest(product_id=product_id, grace_s=grace_s), metadata=connection.admin_key()
        )
    output.record(answer)


@command(app, idempotency_key=True)
async def disable(connection: Connection, output: Output, product: Named) -> None:
    """Refuse a product's keys from now on; its engines stay as they are."""
    product_id = await find(connection, product)
    async with connection.products() as products:
        answer = await products.DisableProduct(
            pb.DisableProductRequest(product_id=product_id), metadata=connection.admin_key()
        )
    output.record(answer, *_PRODUCT)


@command(app, idempotency_key=True)
async def enable(connection: Connection, output: Output, product: Named) -> None:
    """Take a disabled product's keys again."""
    product_id = await find(connection, product)
    async with connection.products() as products:
        answer = await products.EnableProduct(
            pb.EnableProductRequest(product_id=product_id), metadata=connection.admin_key()
        )
    output.record(answer, *_PRODUCT)


async def find(connection: Connection, named: str) -> str:
    """The id of the product with this slug or id.

    Raises:
        ProductNotFound: no product has this slug.
    """
    if _UUID.fullmatch(named):
        return named
    async with connection.products() as products:
        answer = await listed(products.ListProducts, pb.ListProductsRequest(), connection.admin_key())
    for product in answer.products:
        if product.slug == named:
            return product.product_id
    raise RemoteError(ProductNotFound.code, "no product with this slug")


def _named(
    max_engines: int | None,
    rate_limit_rpm: NumberOrNone | None,
    allow_image: list[str] | None,
    idle_sleep_after_s: NumberOrNone | None,
    max_keep_awake_s: int | None,
) -> dict[str, object]:
    """The fields of a policy that options have named, as they are in JSON."""
    fields = {
        "max_engines": max_engines,
        "rate_limit_rpm": rate_limit_rpm,
        "allowed_images": [glob for glob in allow_image if glob != "none"] if allow_image else None,
        "idle_sleep_after_s": idle_sleep_after_s,
        "max_keep_awake_s": max_keep_awake_s,
    }
    return {
        name: value.number if isinstance(value, NumberOrNone) else value
        for name, value in fields.items()
        if value is not None
    }
