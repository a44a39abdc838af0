"""The product that `up` registers for those who want to try the platform."""

import secrets

from services.cli.failure import Failure
from services.cli.rest import Listener
from services.cli.var_directory import VarDirectory

_SLUG = "demo"
_POLICY = {"max_engines": 100, "rate_limit_rpm": 6000}


def platform_key(gateway: Listener, operators: Listener, admin_key: str, var: VarDirectory, secret: str) -> str:
    """The demo product's key: from an earlier run, or of a product registered now.

    Goes through the gateway, and so shows that the parts work together. Blocks.

    Args:
        gateway: where products call.
        operators: where products are registered.
        admin_key: registers products.
        var: keeps the key,
        secret: under this name.

    Raises:
        Failure: the platform refuses.
    """

    def register() -> str:
        try:
            return _register(operators, admin_key, _SLUG)
        except _SlugExists:
            # Its key is lost: kept only as a hash there, and not here.
            return _register(operators, admin_key, f"{_SLUG}-{secrets.token_hex(4)}")

    key = var.secret(secret, register)
    status, _ = gateway.call("POST", "/engines/nobody/admit", {"X-Platform-Key": key})
    if status == 401:
        # Of a registry that is no more.
        var.forget(secret)
        return var.secret(secret, register)
    return key


class _SlugExists(Exception):
    pass


def _register(operators: Listener, admin_key: str, slug: str) -> str:
    status, answer = operators.call(
        "POST", "/products/register", {"X-Admin-Key": admin_key}, {"slug": slug, "policy": _POLICY}
    )
    if status == 409:
        raise _SlugExists
    if status != 200:
        raise Failure(f"the demo product was refused: {answer['error']['message']}")
    return str(answer["platform_api_key"])
