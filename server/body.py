"""Read a request's body: JSON, or a form with files (``multipart/form-data``)."""

from __future__ import annotations

from collections.abc import Mapping
from encodings import normalize_encoding
from encodings.aliases import aliases
from typing import Any, Literal, get_args, get_origin

import orjson
from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ..protocol.errors import BodyTooLarge, Malformed
from .body_validation import refuse_query, validate
from .bounded import MAX_TEXT, MAX_VALUES, check_json, parse, read_body
from .images import MOST_IMAGES
from .schemas import GenerateBody, parse_generate

FORM = "multipart/form-data"


def _has_text(annotation: Any) -> bool:
    """True if values of this type are strings, or lists of strings."""
    if get_origin(annotation) is dict:
        return False
    return annotation is str or get_origin(annotation) is Literal or any(map(_has_text, get_args(annotation)))


_TEXTS = frozenset(name for name, field in GenerateBody.model_fields.items() if _has_text(field.annotation))
"""Fields of a form that are text as it stands; every other one is JSON: ``-F seed=4 -F stream=true``."""

_AS_THEY_STAND = (b"7bit", b"8bit", b"binary")
_READ_AS_UTF8 = ("utf_8", "ascii", "latin_1")
"""Charsets of a part; text in the last, which some programs name always, must be ASCII."""
_MOST_FIELDS = 256
_LONGEST_FIELD = 2**20
"""Bytes of a field that is text, so also of an image in base64."""


async def read_generate(request: Request) -> tuple[GenerateBody, list[str | bytes]]:
    """The fields, and the images as they came: text or files. Raises ``Malformed`` or ``InvalidRequest``."""
    refuse_query(request)
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != FORM.encode():
        data = await read_body(request)
        body = await parse(data, parse_generate)
        if body.image is None and len(data) > MAX_TEXT:
            raise BodyTooLarge(f"A request without images may have {MAX_TEXT / 1e6:g} MB.")
        return body, [*(body.image or ())]
    if _charset(options) != "utf_8":
        raise Malformed(f"A form is read as UTF-8, not {_shown(options[b'charset'])}; leave out the charset.")
    return await _read_form(request)


class _WholeForm(MultiPartParser):
    """A parser that knows whether the form came to its end. Files stay in memory, where bodies are bounded."""

    ended = False
    _part_charset = ""
    spool_max_size = 2**40

    def on_headers_finished(self) -> None:
        """Raises ``MultiPartException`` for a part whose text would be read as something else than it is."""
        super().on_headers_finished()
        part = f"The part {self._current_part.field_name[:100]!r}"
        headers = dict(self._current_part.item_headers)
        encoding = headers.get(b"content-transfer-encoding", b"binary").strip()
        if encoding.lower() not in _AS_THEY_STAND:
            raise MultiPartException(f"{part} has the transfer encoding {_shown(encoding)}; send it as it stands.")
        _, options = parse_options_header(headers.get(b"content-type", b""))
        self._part_charset = _charset(options)
        if self._part_charset not in _READ_AS_UTF8:
            raise MultiPartException(f"{part} has the charset {_shown(options[b'charset'])}; send UTF-8.")

    def on_part_end(self) -> None:
        """Raises ``MultiPartException`` for text in Latin-1 that is not ASCII."""
        part = self._current_part
        if self._part_charset == "latin_1" and not part.data.isascii():
            raise MultiPartException(f"The part {part.field_name[:100]!r} has text in Latin-1; send UTF-8.")
        super().on_part_end()

    def on_end(self) -> None:
        self.ended = True


def _charset(options: Mapping[bytes, bytes]) -> str:
    """Python's name of the charset in a header's ``options``; UTF-8's if there is none.

    ``codecs.lookup`` would keep every name that it does not know.
    """
    name = normalize_encoding(options.get(b"charset", b"utf-8").decode("latin-1")).lower()
    return aliases.get(name, name)


def _shown(value: bytes) -> str:
    return repr(value[:100].decode("latin-1"))


async def _read_form(request: Request) -> tuple[GenerateBody, list[str | bytes]]:
    limits = {"max_files": MOST_IMAGES, "max_fields": _MOST_FIELDS, "max_part_size": _LONGEST_FIELD}
    parser = _WholeForm(request.headers, request.stream(), **limits)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Malformed(f"The form cannot be read: {error.message} (An image belongs into a file's part.)") from None
    try:
        if not parser.ended:
            raise Malformed("The form ends before its last boundary.")
        body = validate(_fields(form), GenerateBody)
        files = [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
        return body, [*(body.image or ()), *(file for file in files if file)]  # an empty one was left unchosen
    finally:
        await form.close()


def _fields(form: FormData) -> dict[str, Any]:
    """The text fields of the form; a repeated field is a list. Files must be images."""
    found: dict[str, list[Any]] = {}
    for name, part in form.multi_items():
        plain = name[:100].removesuffix("[]")
        if not isinstance(part, UploadFile):
            found.setdefault(plain, []).append(part if plain in _TEXTS else _value(plain, part))
        elif plain != "image":
            raise Malformed(f"The form has a file as {plain!r}; files are images, as `image`.", field=plain)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _value(name: str, text: str) -> Any:
    check_json(text.encode(), MAX_VALUES)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Malformed(f"The form's field {name} must be JSON, such as 4 or true.", field=name) from None
