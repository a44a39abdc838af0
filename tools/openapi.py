"""`docs/openapi.json`: what REST callers see, as OpenAPI 3.1.

Methods, paths, fields and texts come from the protos, statuses from the error table, roles and idempotent methods
from the Provisioner's own tables, lengths and limits from the code that checks them.
"""

import json
import re
from collections.abc import Iterable, Sequence
from importlib import metadata

from google.api import annotations_pb2  # type: ignore[import-untyped]
from google.protobuf import descriptor_pb2

from services.shared.authorization import ROLES
from tools.generate import ROOT, error_rows
from tools.openapi_rules import ALWAYS, ERROR, IDEMPOTENCY_KEY, KEYED, REQUIRED, RULES, SECURITY, SERVERS, Schema
from tools.reference import comments_of

Field = descriptor_pb2.FieldDescriptorProto
Message = descriptor_pb2.DescriptorProto
Method = descriptor_pb2.MethodDescriptorProto

_SCALARS: dict[Field.Type.ValueType, Schema] = {
    Field.TYPE_STRING: {"type": "string"},
    Field.TYPE_BOOL: {"type": "boolean"},
    Field.TYPE_DOUBLE: {"type": "number"},
    Field.TYPE_INT32: {"type": "integer", "format": "int32", "minimum": -(2**31), "maximum": 2**31 - 1},
}


class Document:
    """The document.

    Args:
        image: the compiled protos, with their comments.
        errors: the error table: code, HTTP status, gRPC code, description.
    """

    def __init__(self, image: descriptor_pb2.FileDescriptorSet, errors: Sequence[tuple[str, int, str, str]]) -> None:
        self._files = [file for file in image.file if file.name.startswith("september/")]
        self._errors = errors
        self._messages: dict[str, tuple[Message, list[str]]] = {}
        self._enums: dict[str, list[str]] = {}
        for file in self._files:
            comments = comments_of(file)
            for index, message in enumerate(file.message_type):
                name = f".{file.package}.{message.name}"
                texts = [comments[4, index, 2, number] for number in range(len(message.field))]
                self._messages[name] = message, texts
                # The first value of each is never sent.
                self._enums |= {f"{name}.{e.name}": [v.name for v in e.value[1:]] for e in message.enum_type}
        self._components = {"Error": ERROR}

    def json(self) -> str:
        tags, paths = [], dict[str, Schema]()
        for file in self._files:
            comments = comments_of(file)
            for index, service in enumerate(file.service):
                tags.append({"name": service.name, "description": comments[6, index]})
                for number, method in enumerate(service.method):
                    rule = method.options.Extensions[annotations_pb2.http]
                    verb = rule.WhichOneof("pattern")
                    if verb is not None:
                        role_name = f"/{file.package}.{service.name}/{method.name}"
                        call = self._call(role_name, method, comments[6, index, 2, number])
                        paths.setdefault(getattr(rule, verb), {})[verb] = {"tags": [service.name], **call}
        whole = {
            "openapi": "3.1.0",
            "info": {
                "title": "September platform",
                "version": metadata.version("september-platform"),
                "description": "Generated from the protos by `make gen`; do not edit. What the gateway takes and"
                " answers is in gateway.md.",
            },
            "tags": tags,
            "paths": paths,
            "components": {
                "securitySchemes": {
                    "platformKey": {"type": "apiKey", "in": "header", "name": "X-Platform-Key"},
                    "adminKey": {"type": "apiKey", "in": "header", "name": "X-Admin-Key"},
                },
                "schemas": dict(sorted(self._components.items())),
            },
        }
        return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"

    def _call(self, full_name: str, method: Method, text: str) -> Schema:
        rule = method.options.Extensions[annotations_pb2.http]
        path_fields = re.findall(r"{(\w+)}", getattr(rule, rule.WhichOneof("pattern")))
        message, texts = self._messages[method.input_type]
        parameters: list[Schema] = []
        of_body = []
        for field, described in zip(message.field, texts, strict=True):
            if field.name in path_fields or not rule.body:
                place = "path" if field.name in path_fields else "query"
                parameters.append(
                    {
                        "name": field.name,
                        "in": place,
                        "required": place == "path",
                        "description": described,
                        "schema": self._schema(field, request=True),
                    }
                )
            else:
                of_body.append((field, described))
        codes = ALWAYS | set(re.findall(r"\b[A-Z_]{6,}\b", text.partition("Errors:")[2]))
        if full_name in KEYED:
            parameters.append(IDEMPOTENCY_KEY)
            codes.add("IDEMPOTENCY_CONFLICT")
        if SECURITY[ROLES[full_name]]:
            # Too many wrong keys came from the address.
            codes.add("RATE_LIMITED")
        if path_fields:
            # `.` and `..` lead elsewhere.
            codes.add("ROUTE_NOT_FOUND")
        call: Schema = {
            "operationId": method.name,
            "description": text,
            "servers": SERVERS[ROLES[full_name]],
            "security": SECURITY[ROLES[full_name]],
            "parameters": parameters,
        }
        if rule.body:
            schema = (
                self._object(of_body, request=True) if rule.body == "*" else self._schema(of_body[0][0], request=True)
            )
            required = any(field.name in REQUIRED for field, _ in of_body)
            call["requestBody"] = {"required": required, "content": {"application/json": {"schema": schema}}}
        return {**call, "responses": {"200": self._answer(method), **self._refusals(codes)}}

    def _answer(self, method: Method) -> Schema:
        message, texts = self._messages[method.output_type]
        only = method.options.Extensions[annotations_pb2.http].response_body
        if method.name == "Admit":
            schema = _admit({field.name: self._schema(field) for field in message.field})
        elif only:
            schema = next(self._schema(field) for field in message.field if field.name == only)
        else:
            schema = self._component(message.name, self._object(zip(message.field, texts, strict=True)))
        if method.server_streaming:
            return {"description": "A line for every change.", "content": {"application/x-ndjson": {"schema": schema}}}
        return {"description": "Done.", "content": {"application/json": {"schema": schema}}}

    def _refusals(self, codes: set[str]) -> dict[str, Schema]:
        refusals: dict[str, Schema] = {}
        for status in sorted({status for code, status, _, _ in self._errors if code in codes}):
            rows = [(code, text) for code, of_code, _, text in self._errors if of_code == status and code in codes]
            refusals[str(status)] = {
                "description": " ".join(f"`{code}`: {text}" for code, text in rows),
                "content": {"application/json": {"schema": _error([code for code, _ in rows])}},
            }
            if {"RATE_LIMITED", "UNAVAILABLE"} & {code for code, _ in rows}:
                refusals[str(status)]["headers"] = {
                    "Retry-After": {"description": "Seconds, if waiting helps.", "schema": {"type": "integer"}}
                }
        return refusals

    def _object(self, fields: Iterable[tuple[Field, str]], *, request: bool = False) -> Schema:
        properties, required = {}, []
        for field, text in fields:
            properties[field.name] = {**self._schema(field, request=request), "description": text}
            # An answer has all that can't be absent, be it empty.
            always = not field.proto3_optional and (
                field.type != Field.TYPE_MESSAGE or field.label == Field.LABEL_REPEATED
            )
            if field.name in REQUIRED if request else always:
                required.append(field.name)
        return {"type": "object", "properties": properties, **({"required": required} if required else {})}

    def _schema(self, field: Field, *, request: bool = False) -> Schema:
        schema = self._type(field)
        if field.label == Field.LABEL_REPEATED and "additionalProperties" not in schema:
            schema = {"type": "array", "items": schema}
        return {**schema, **RULES.get(field.name, {})} if request else schema

    def _type(self, field: Field) -> Schema:
        if field.type == Field.TYPE_ENUM:
            return {"enum": self._enums[field.type_name]}
        if field.type != Field.TYPE_MESSAGE:
            return _SCALARS[field.type]
        if field.type_name == ".google.protobuf.Timestamp":
            return {"type": "string", "format": "date-time"}
        if field.type_name == ".google.protobuf.Struct":
            # Nothing else in a request is untyped, and no other object may have no other fields.
            message, texts = self._messages[".september.provisioner.v1.Policy"]
            fields = self._object(zip(message.field, texts, strict=True), request=True)
            return self._component("PolicyFields", {**fields, "additionalProperties": False})
        if field.type_name not in self._messages:
            # Of the maps there are.
            return {"type": "object", "additionalProperties": _SCALARS[Field.TYPE_INT32]}
        message, texts = self._messages[field.type_name]
        return self._component(message.name, self._object(zip(message.field, texts, strict=True)))

    def _component(self, name: str, schema: Schema) -> Schema:
        self._components[name] = schema
        return {"$ref": f"#/components/schemas/{name}"}


def _admit(fields: dict[str, Schema]) -> Schema:
    """Of all answers the one that REST words differently: a denial has `"engine":null`."""
    forms: list[Schema] = [
        {"admitted": {"const": True}, "engine": fields["engine"]},
        {"admitted": {"const": False}, "engine": {"type": "null"}, "reason": fields["reason"]},
    ]
    return {"oneOf": [{"type": "object", "properties": form, "required": list(form)} for form in forms]}


def _error(codes: list[str]) -> Schema:
    """The envelope that all errors have, with one of these codes."""
    code = {"properties": {"code": {"enum": codes}}}
    return {"$ref": "#/components/schemas/Error", "properties": {"error": code}}


def main() -> None:
    image = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "build" / "image.binpb").read_bytes())
    (ROOT / "docs" / "openapi.json").write_text(Document(image, error_rows()).json())


if __name__ == "__main__":
    main()
