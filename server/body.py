"""The body of a request in either of its forms: JSON, or a form with files (``multipart/form-data``)."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ..protocol.errors import Malformed
from .images import MOST_IMAGES
from .schemas import GenerateBody, parse_generate, validate

_TEXTS = frozenset({"prompt", "negative_prompt", "output_format", "image"})
"""Fields of a form that are text as it stands; every other one is JSON: ``-F seed=4 -F stream=true``."""

_MOST_FIELDS = 256
_LONGEST_FIELD = 2**20


async def read_generate(request: Request) -> tuple[GenerateBody, list[str | bytes]]:
    """The fields, and the images as they came: text or files. Raises ``Malformed`` or ``InvalidRequest``."""
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await _read_form(request)
    body = parse_generate(await request.body())
    return body, [*(body.image or ())]


async def _read_form(request: Request) -> tuple[GenerateBody, list[str | bytes]]:
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=MOST_IMAGES,
        max_fields=_MOST_FIELDS,
        max_part_size=_LONGEST_FIELD,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise Malformed(f"The form cannot be read: {getattr(error, 'message', 'it has no boundary')}") from None
    try:
        body = validate(_fields(form))
        files = [await part.read() for name, part in form.multi_items() if isinstance(part, UploadFile)]
        return body, [*(body.image or ()), *files]
    finally:
        await form.close()


def _fields(form: FormData) -> dict[str, Any]:
    """What the form says in text. A field that is there more than once is a list. Files are images, whatever else."""
    found: dict[str, list[Any]] = {}
    for name, part in form.multi_items():
        plain = name.removesuffix("[]")
        if isinstance(part, UploadFile):
            if plain != "image":
                raise Malformed(f"The form has a file as {name[:100]!r}; files are images, as `image`.", field=plain)
            continue
        found.setdefault(plain, []).append(part if plain in _TEXTS else _value(plain, part))
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _value(name: str, text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Malformed(f"The form's field {name[:100]} must be JSON, such as 4 or true.", field=name[:100]) from None
