"""Rows of the registry as domain objects."""

from collections.abc import Mapping
from dataclasses import fields
from importlib.resources import files
from typing import Any, LiteralString

from services.provisioner.domain.engine import Engine, EngineStatus
from services.provisioner.domain.operation import (
    OpenOperation,
    Operation,
    OperationKind,
    Outcome,
    Queue,
    Settled,
    Step,
)
from services.provisioner.domain.policy import Policy
from services.provisioner.domain.product import Product, Registration
from services.shared import queries
from services.shared.errors import Unavailable


def load_sql(name: str) -> dict[str, LiteralString]:
    """The named blocks of `services/provisioner/sql/{name}.sql`."""
    return queries.load(files("services.provisioner") / "sql" / f"{name}.sql")


def to_engine(row: Mapping[str, Any]) -> Engine:
    # By name: a column that a later version has added is not ours to know.
    values = {field.name: row[field.name] for field in fields(Engine)}
    return Engine(**(values | {"status": to_status(row["status"])}))


def to_status(word: str) -> EngineStatus:
    """Raises Unavailable: it is one that a later version has written, to which the engine is left."""
    try:
        return EngineStatus(word)
    except ValueError as error:
        raise Unavailable("the engine's status is known to a later version alone") from error


def to_operation(row: Mapping[str, Any]) -> Operation:
    words = {"kind": OperationKind(row["kind"]), "queue": Queue(row["queue"]), "step": Step(row["step"])}
    return Operation(**(dict(row) | words))


def to_open_operation(row: Mapping[str, Any]) -> OpenOperation:
    """Raises Unavailable: it is of a kind that a later version has begun, which will end it."""
    try:
        return OpenOperation(**(dict(row) | {"kind": OperationKind(row["kind"])}))
    except ValueError as error:
        raise Unavailable("the engine's operation is known to a later version alone") from error


def to_settled(row: Mapping[str, Any]) -> Settled:
    outcome = row["outcome"]
    return Settled(
        operation_id=row["operation_id"],
        outcome=None if outcome is None else Outcome(outcome),
        error_code=row["error_code"],
        error_message=row["error_message"],
    )


def to_product(row: Mapping[str, Any]) -> Product:
    policy = {field.name: row[field.name] for field in fields(Policy)}
    return Product(
        product_id=row["product_id"],
        slug=row["slug"],
        policy=Policy(**(policy | {"allowed_images": tuple(row["allowed_images"])})),
    )


def to_registration(row: Mapping[str, Any]) -> Registration:
    return Registration(product=to_product(row), created_at=row["created_at"], disabled_at=row["disabled_at"])
