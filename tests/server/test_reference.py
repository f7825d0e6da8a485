"""The reference can be read by people and programs, without a network and without a key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from safelight.protocol.config import Config

from .stage import stage

pytestmark = pytest.mark.anyio


def references(part: Any) -> Iterator[str]:
    for item in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from references(item)
    if isinstance(part, dict) and "$ref" in part:
        yield part["$ref"]


def resolved(document: Any, reference: str) -> Any:
    assert reference.startswith("#/"), reference
    for step in reference.removeprefix("#/").split("/"):
        document = document[step]
    return document


@pytest.mark.parametrize("key", [None, "a key of some length"])
async def test_every_reference_of_the_schema_points_to_something(key: str | None) -> None:
    async with stage(Config(api_key=key)) as played:
        reply = await played.client.get("/openapi.json")
    assert reply.status_code == 200
    schema = reply.json()
    for reference in references(schema):
        resolved(schema, reference)
    assert "$defs" not in reply.text
    body = schema["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    (lora,) = [one for one in body["properties"]["lora"]["anyOf"] if one.get("type") == "array"]
    assert set(lora["items"]["properties"]) == {"name", "scale"}


@pytest.mark.parametrize("key", [None, "a key of some length"])
async def test_the_page_names_every_route_and_field_and_loads_nothing(key: str | None) -> None:
    async with stage(Config(api_key=key)) as played:
        reply = await played.client.get("/docs")
        schema = (await played.client.get("/openapi.json")).json()
    assert (reply.status_code, reply.headers["content-type"].partition(";")[0]) == (200, "text/html")
    assert not re.search(r"https?://|<script|<link|src=|@import", reply.text)
    for path, methods in schema["paths"].items():
        for method in methods:
            assert f"{method.upper()} {path}</code>" in reply.text
    for field in ("guidance_scale", "rollout_noise_level", "deterministic"):
        assert f"<code>{field}</code>" in reply.text
