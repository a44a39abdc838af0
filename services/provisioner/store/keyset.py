"""Pages of lists, of which no more is read than is shown."""

from collections.abc import Mapping
from typing import LiteralString


def page(
    sql: LiteralString, within: Mapping[str, object], after: Mapping[str, object], *, latest_first: bool = False
) -> tuple[LiteralString, dict[str, object]]:
    """A statement for the rows within these values that come after that key, and its parameters.

    There has to be an index of the columns of both, in that order. From the key on as many rows as
    are wanted are read in its order, and those that are not within any more are left out. With a
    plain condition an index of the key alone would do as well; the planner, which takes whatever
    is meant for evenly spread, might choose it and read past all that belongs to others.

    Args:
        sql: has `{after}` and `{order}` where rows are read, and `{within}` where they are left out.
        within: values by column.
        after: values of the columns that are the order.
        latest_first: descending, so that after means less.
    """
    beyond, direction = ("<", " DESC") if latest_first else (">", "")
    values = {**within, **after}
    # Names of columns are literals of the code.
    columns, parameters = ", ".join(values), ", ".join(f"%({column})s" for column in values)
    return sql.format(
        after=f"({columns}) {beyond} ({parameters})",
        order=", ".join(column + direction for column in values),
        within=" AND ".join(f"{column} = %({column})s" for column in within) or "true",
    ), values
