"""``/docs``: every route with its fields, as one page that needs nothing from anywhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request, Response

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h2{margin-top:2.5rem}code,pre{font:14px/1.4 ui-monospace,monospace;background:#f4f4f4;border-radius:3px}"
    "code{padding:0 .2em}pre{padding:.6em;overflow:auto}table{border-collapse:collapse;width:100%}"
    "td,th{text-align:left;vertical-align:top;padding:.2rem .6rem .2rem 0;border-bottom:1px solid #ddd}"
)
_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        return Response(page(request.app.openapi()), media_type="text/html", headers=_HEADERS)

    return router


def page(schema: dict[str, Any]) -> str:
    """The OpenAPI ``schema`` as HTML."""
    title = escape(f"{schema['info']['title']} {schema['info']['version']}")
    parts = "".join(_parts(schema))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>The same for programs: <a href=openapi.json><code>/openapi.json</code></a>. A server with "
        f"an API key wants <code>Authorization: Bearer KEY</code>.</p>{parts}</html>"
    )


def _parts(schema: dict[str, Any]) -> Iterator[str]:
    by_tag: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, methods in schema["paths"].items():
        for method, described in methods.items():
            by_tag.setdefault((described.get("tags") or ["other"])[0], []).append((method, path, described))
    for tag, found in by_tag.items():
        yield f"<h2>{escape(tag.capitalize())}</h2>"
        for method, path, described in found:
            yield f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{escape(described.get('summary', ''))}.</p>"
            yield from _fields(described)


def _fields(described: dict[str, Any]) -> Iterator[str]:
    """Yield the fields of the body's first media type."""
    contents = described.get("requestBody", {}).get("content", {})
    if not contents:
        return
    yield f"<p>Body: {' or '.join(f'<code>{escape(kind)}</code>' for kind in contents)}.</p><table>"
    for name, field in next(iter(contents.values()))["schema"].get("properties", {}).items():
        default = f"default <code>{escape(str(field['default']))}</code>" if field.get("default") is not None else ""
        text = escape(field.get("description", ""))
        yield f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field))}<td>{text}<td>{default}"
    yield "</table>"
    if (example := next(iter(contents.values())).get("example")) is not None:
        yield f"<p>For example:</p><pre>{escape(json.dumps(example, indent=2))}</pre>"


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"] if one.get("type") != "null")
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "any"))
