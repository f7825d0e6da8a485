"""A trainer's author finds every route in /openapi.json: what it takes, with an example that works, and its answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from safelight.protocol.adapters import AdapterState
from safelight.protocol.errors import Unavailable
from safelight.protocol.generation import Failed, Generate
from safelight.protocol.messages import FromScheduler, ToScheduler
from safelight.protocol.reports import Operated

from .stage import Stage, stage

pytestmark = pytest.mark.anyio

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip
NOTES = {"title", "description", "default", "example", "examples", "format", "contentEncoding"}


def refused(generate: Generate) -> list[FromScheduler]:
    return [Failed(generate.request_id, Unavailable("not today").info())]


def operated(message: ToScheduler) -> list[FromScheduler]:
    return [Operated(getattr(message, "request_id", ""), {}, "7", [], AdapterState())]


def faults(value: Any, schema: dict[str, Any], place: str = "$") -> Iterator[str]:
    """Where ``value`` is not what the JSON ``schema`` says, by the keywords that the routes use."""
    for keyword, rule in schema.items():
        match keyword:
            case "type":
                if not isinstance(value, TYPES[rule]) or (rule in ("integer", "number") and isinstance(value, bool)):
                    yield f"{place} is not {rule}"
            case "anyOf":
                if all(any(faults(value, one, place)) for one in rule):
                    yield f"{place} is none of {rule}"
            case "enum" | "const":
                if value not in (rule if keyword == "enum" else [rule]):
                    yield f"{place} is not of {rule}"
            case "required":
                yield from (f"{place} has no {name}" for name in rule if name not in value)
            case "properties":
                for name, one in rule.items():
                    yield from faults(value[name], one, f"{place}.{name}") if name in value else ()
            case "additionalProperties" if rule is not True:
                for name in value.keys() - schema.get("properties", {}).keys():
                    yield from faults(value[name], rule, f"{place}.{name}") if rule else [f"{place} has {name}"]
            case "items":
                for index, item in enumerate(value) if isinstance(value, list) else ():
                    yield from faults(item, rule, f"{place}[{index}]")
            case "minLength" | "minItems":
                if len(value) < rule:
                    yield f"{place} is short"
            case "maxLength" | "maxItems":
                if len(value) > rule:
                    yield f"{place} is long"
            case "minimum" | "exclusiveMinimum" | "maximum" | "exclusiveMaximum":
                bound = {
                    "minimum": value >= rule,
                    "exclusiveMinimum": value > rule,
                    "maximum": value <= rule,
                }
                if not bound.get(keyword, value < rule if keyword == "exclusiveMaximum" else True):
                    yield f"{place} is out of range"
            case "additionalProperties":
                pass
            case _:
                assert keyword in NOTES, f"{place} has {keyword}"


async def operations(played: Stage) -> list[tuple[str, str, dict[str, Any]]]:
    schema = (await played.client.get("/openapi.json")).json()
    return [(method, path, one) for path, methods in schema["paths"].items() for method, one in methods.items()]


async def test_no_route_is_without_its_body_its_answer_and_its_errors() -> None:
    async with stage() as played:
        for method, path, described in await operations(played):
            answers = described["responses"]
            assert answers["200"]["description"], path
            assert {"401", "403", "500"} <= answers.keys(), path
            for status, answer in answers.items():
                if status != "200":
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("Refusal"), (path, status)
            if method == "post":
                assert {"400", "413", "422", "429", "503"} <= answers.keys(), path
                body = described["requestBody"]["content"]["application/json"]
                assert not [*faults(body["example"], body["schema"])], path


async def test_no_example_is_refused_by_the_server_that_gives_it() -> None:
    async with stage(answer=refused) as played:
        played.scheduler.operated = operated
        for method, path, described in await operations(played):
            if method == "post":
                example = described["requestBody"]["content"]["application/json"]["example"]
                reply = await played.client.post(path, json=example)
                error = reply.json().get("error", {})
                assert reply.status_code < 500 or reply.status_code == 503, (path, reply.text)
                assert error.get("code") not in ("malformed", "internal"), (path, reply.text)
