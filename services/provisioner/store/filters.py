"""Lists that may be narrowed down."""

from typing import LiteralString


def filtered(sql: LiteralString, **wanted: object) -> tuple[LiteralString, dict[str, object]]:
    """A statement with a condition for every column that a value is wanted of, and those values.

    Written for each case, because a plan for "this value, if there is one" can't rely on an index.

    Args:
        sql: has `{filters}` where the conditions belong, after another one.
        wanted: values by column; None for any.
    """
    values = {column: value for column, value in wanted.items() if value is not None}
    # Names of arguments are literals of the code.
    filters: LiteralString = " ".join(f"AND {column} = %({column})s" for column in values)
    return sql.format(filters=filters), values
