"""What OpenAPI says of calls and the protos do not, from the code that has it: keys, limits, the form of errors."""

from typing import Any

from services.provisioner.domain import idempotency, paging, policy, product
from services.provisioner.domain.audit import AuditAction
from services.provisioner.domain.engine import EngineStatus
from services.provisioner.products import MAX_GRACE_S
from services.provisioner.servicers.idempotency import IN_TRANSACTION, THROUGH_OPERATION
from services.shared.authorization import Role
from services.shared.user_id import USER_ID

Schema = dict[str, Any]

# What the code checks in requests, by the field's name.
RULES: dict[str, Schema] = {
    "user_id": {"minLength": 1, "maxLength": 255, "pattern": f"^{USER_ID.pattern}$"},
    "slug": {"pattern": f"^{product.SLUG.pattern}$"},
    "product_id": {"format": "uuid"},
    "status": {"enum": list(EngineStatus)},
    "action": {"enum": list(AuditAction)},
    "limit": {"minimum": 1, "maximum": paging.MAX_LIMIT, "default": paging.DEFAULT_LIMIT},
    "offset": {"minimum": 0},
    "grace_s": {"minimum": 0, "maximum": MAX_GRACE_S},
    "max_engines": {"minimum": 0, "maximum": policy.MAX_ENGINES},
    "rate_limit_rpm": {"minimum": 1, "maximum": policy.MAX_RATE_LIMIT_RPM},
    "allowed_images": {
        "maxItems": policy.MAX_GLOBS,
        "items": {"type": "string", "pattern": f"^{policy.GLOB.pattern}$"},
    },
    "idle_sleep_after_s": {"minimum": 1, "maximum": policy.MAX_IDLE_SLEEP_AFTER_S},
    "max_keep_awake_s": {"minimum": 0, "maximum": policy.MAX_KEEP_AWAKE_S, "default": policy.DEFAULT_KEEP_AWAKE_S},
}
# protobuf has no word for it.
REQUIRED = {"user_id", "slug", "policy", "max_engines"}
SECURITY: dict[Role, list[dict[str, list[str]]]] = {
    Role.ANYONE: [],
    Role.PRODUCT: [{"platformKey": []}],
    Role.ADMIN: [{"adminKey": []}],
    Role.PRODUCT_OR_ADMIN: [{"platformKey": []}, {"adminKey": []}],
}
_PRODUCTS = {"url": "http://127.0.0.1:8080"}
_OPERATORS = {"url": "http://127.0.0.1:8081", "description": "The operators' listener."}
SERVERS = {
    Role.ANYONE: [_PRODUCTS],
    Role.PRODUCT: [_PRODUCTS],
    Role.ADMIN: [_OPERATORS],
    Role.PRODUCT_OR_ADMIN: [_PRODUCTS, _OPERATORS],
}
KEYED = {*THROUGH_OPERATION, *IN_TRANSACTION}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The same call with the same key has one effect and one answer, for 24 hours.",
    "schema": {"type": "string", "pattern": f"^{idempotency.KEY.pattern}$"},
}
# Any call may have these answers.
ALWAYS = {"INVALID_REQUEST", "INTERNAL", "UNAVAILABLE"}

_error = {"code": {"type": "string"}, "message": {"type": "string"}}
_envelope = {"error": {"type": "object", "properties": _error, "required": list(_error)}}
ERROR: Schema = {"type": "object", "properties": _envelope, "required": list(_envelope)}
