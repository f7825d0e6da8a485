"""Descriptions of routes for the API reference: the body with an example, the answer, and the errors."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..protocol.errors import BY_STATUS
from .body_validation import Body

Answers = dict[int | str, dict[str, Any]]


class Error(BaseModel):
    """``field`` is the one that is wrong, where it is one."""

    code: str
    message: str
    field: str | None
    request_id: str


class Refusal(BaseModel):
    """Every error's body."""

    error: Error


class TrainingRefusal(Refusal):
    """An error's body on the post-training routes, with what is known of the tensors beside it."""

    model_config = ConfigDict(extra="allow")

    success: Literal[False]
    message: str


class Done(BaseModel):
    """A post-training route's answer, with what the route's description names beside it."""

    model_config = ConfigDict(extra="allow")

    success: Literal[True]
    message: str


READING = (401, 403, 500)
"""The errors that every route may have: it needs a key, its caller is a foreign page, or the server is at fault."""

GENERATING = (400, 404, 409, 413, 422, 429, 503, 504, *READING)
OPERATING = (400, 409, 413, 422, 429, 503, 504, *READING)

_BEFORE_THE_ROUTE = frozenset({401, 403})


def answers(
    answer: str,
    statuses: Iterable[int],
    *,
    reply: type[BaseModel] | None = None,
    refusal: type[BaseModel] = Refusal,
) -> Answers:
    """``answer`` of the type ``reply``, and the errors ``statuses``.

    Bodies are given as schemas, those of errors in :func:`error_schemas`: FastAPI would prepare each model for
    validation, route by route, which takes longer than all else that an application is made of.
    """
    found: Answers = {200: {"description": answer} | ({} if reply is None else _content(body_schema(reply)))}
    for status in sorted(statuses):
        said = (BY_STATUS[status].__doc__ or "").partition("\n")[0]
        model = Refusal if status in _BEFORE_THE_ROUTE else refusal
        found[status] = {"description": said, **_content({"$ref": f"#/components/schemas/{model.__name__}"})}
    return found


def error_schemas() -> dict[str, Any]:
    """The bodies of errors by the names that :func:`answers` gives them, for OpenAPI."""
    return {model.__name__: body_schema(model) for model in (Refusal, TrainingRefusal)}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def request_body(form: type[Body], *media_types: str) -> dict[str, Any]:
    """The body ``form`` with its example, for OpenAPI; it is JSON where no ``media_types`` are given."""
    schema = body_schema(form)
    content = {kind: {"schema": schema, "example": schema["example"]} for kind in media_types or ("application/json",)}
    return {"requestBody": {"required": bool(schema.get("required")), "content": content}}


def query(form: type[Body]) -> list[dict[str, Any]]:
    """The fields of ``form`` as parameters of a query, for OpenAPI."""
    return [
        {"name": name, "in": "query", "required": False, "schema": field}
        for name, field in body_schema(form)["properties"].items()
    ]


@functools.cache
def body_schema(form: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of ``form`` for OpenAPI, where ``#/$defs`` would point to nothing: definitions are inline."""
    schema = form.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, dict):
            name = str(part.get("$ref", "")).removeprefix("#/$defs/")
            return inline(definitions[name]) if name else {key: inline(value) for key, value in part.items()}
        return [inline(item) for item in part] if isinstance(part, list) else part

    inlined: dict[str, Any] = inline(schema)
    return inlined
