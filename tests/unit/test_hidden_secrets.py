"""What holds a secret does not show it, be it printed by a debugger, a log or a traceback."""

import importlib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel

from tests.unit.test_structure import MODULES, module_name

SECRET = re.compile(r"key|secret|token|password|environment|database_url")
NO_SECRET = re.compile(
    r"_hash$|page_token$|idempotency\.KeyedCall\.key_id$"  # hashes, places in a list,
    r"|memory\._LookUp\.keys$|engine\.handler\.Engine\.keys$"  # what shows nothing of what is in it,
    r"|(tls|gateway)_key_file$|tls\.(Certificate|Identity)\.key$"  # where one is,
    r"|ratelimit_share\.Waiter\.token$"  # the right to one admit
)


def shown_fields() -> Iterator[str]:
    """Every field of a record of the services that is in its `repr`."""
    for module in {module_name(path) for path in MODULES if path.name != "__main__.py"}:
        for kind in vars(importlib.import_module(module)).values():
            if isinstance(kind, type) and kind.__module__ == module:
                yield from (f"{module}.{kind.__qualname__}.{name}" for name in _shown(kind))


def _shown(kind: Any) -> list[str]:
    if is_dataclass(kind):
        return [field.name for field in fields(kind) if field.repr]
    if issubclass(kind, BaseModel):
        return [name for name, field in kind.model_fields.items() if field.repr]
    # Of a named tuple.
    return list(getattr(kind, "_fields", ()))


def test_no_record_shows_a_secret() -> None:
    shown = set(shown_fields())
    assert "services.provisioner.domain.engine.Engine.engine_id" in shown
    found = {name for name in shown if SECRET.search(name.rpartition(".")[2])}
    assert {name for name in found if not NO_SECRET.search(name)} == set()
