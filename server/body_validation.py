"""Validate JSON by a pydantic model, and describe errors in sentences.

Types are checked exactly (``true`` is not an integer, ``"4"`` not a number). Bodies are read under the bounds of
:mod:`.bounded`, in a thread unless they are small.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from ..protocol.errors import Malformed, SafelightError
from .bounded import parse

MOST_ITEMS = 4096  # no configuration allows more outputs, so no list of a generation may be longer

_TYPES = frozenset({"str", "int", "float", "bool", "dict"})
"""How pydantic names the parts of a union, among the steps to a value."""


class Body(BaseModel):
    """The fields that a route takes; a subclass has an example of them as ``json_schema_extra``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def explain(cls, error: ErrorDetails, value: Mapping[str, Any]) -> SafelightError:
        """The ``error`` that pydantic found in ``value``, in the API's words."""
        field = str(error["loc"][0])
        steps = error["loc"][1:] if isinstance(value.get(field), list | dict) else ()
        place = field + "".join(_step(part) for part in steps)
        return Malformed(f"{_sentence(error, place, has_lists=len(error['loc']) > 1 and not steps)}.", field=field)


B = TypeVar("B", bound=Body)


async def decode(body: bytearray, form: type[B], max_values: int) -> B:
    """The body as ``form``; an empty one has every default, and so has a field that is null.

    Raises ``Malformed`` and ``BodyTooLarge``.
    """
    return await parse(body, lambda body: validate(without_nulls(read_object(body or b"{}")), form), max_values)


def from_query(request: Request, form: type[B]) -> B:
    """The query's parameters as ``form``, in which all values are texts. Raises ``Malformed``."""
    return validate(dict(request.query_params), form, strict=False)


def refuse_query(request: Request) -> None:
    """Raise ``Malformed`` for a parameter in the query of a route whose fields are in its body."""
    for name in request.query_params:
        shown = name[:100]
        raise Malformed(f"This route reads no query; send {shown!r} as a field of the body.", field=shown)


def read_object(body: bytes | bytearray) -> dict[str, Any]:
    """A JSON object. Raises ``Malformed``."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"The body cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise Malformed(f"The body must be a JSON object, not {json_type(value)}.")
    return value


def without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` without fields that are null, which a client has left out: trainers write whole objects."""
    return {name: item for name, item in value.items() if item is not None}


def validate(value: Mapping[str, Any], form: type[B], *, strict: bool = True) -> B:
    """The fields in ``value``, as ``form`` has them. Raises what :meth:`Body.explain` makes of the first error."""
    known = {field.alias or name for name, field in form.model_fields.items()}
    for name in value if form.model_config.get("extra") == "forbid" else ():
        if name not in known:  # pydantic would collect an error for each of many
            shown = name[:100]
            raise Malformed(f"There is no field {shown!r}; {near(name, known)}", field=shown)
    try:
        return form.model_validate({name: _as_written(item) for name, item in value.items()}, strict=strict)
    except ValidationError as error:
        raise form.explain(_plainest(error.errors(include_url=False)), value) from None


def _plainest(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """The first error or, where a value is none of a union, the one that looked furthest into it."""
    same = [one for one in errors if one["loc"][0] == errors[0]["loc"][0]]
    return max(same, key=lambda one: len(one["loc"]))


def near(name: str, known: Collection[str]) -> str:
    """Suggest names similar to ``name``, as the end of a sentence."""
    close = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(sorted(known)) or 'none'}."


def _as_written(value: Any) -> Any:
    """Undo that orjson reads an integer beyond 64 bits as a float: it is out of range, not of a wrong type."""
    if isinstance(value, list) and len(value) <= MOST_ITEMS:
        return [int(item) if _is_beyond(item) else item for item in value]
    return int(value) if _is_beyond(value) else value


def _is_beyond(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and abs(value) >= 2**63


def _step(part: str | int) -> str:
    if isinstance(part, int):
        return f"[{part}]"
    return f".{part[:100]}" if part.isidentifier() and part not in _TYPES else ""


def _sentence(error: ErrorDetails, place: str, *, has_lists: bool) -> str:
    kind = error["type"]
    if kind == "missing":
        return f"The field {place} is required"
    if kind == "extra_forbidden":
        return f"There is no field {place}"
    if kind == "literal_error" and isinstance(error["input"], str):
        return f"{place} must be one of {choices(error)}"
    if kind in EXPECTED:
        or_a_list = " or a list of them" if has_lists else ""
        return f"{place} must be {EXPECTED[kind]}{or_a_list}, not {json_type(error['input'])}"
    said = error["msg"].replace(" after validation", "")
    return f"{place} must {said.partition('should ')[2] or said}"


EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "dict_type": "an object",
    "model_type": "an object",
    "list_type": "a list",
    "literal_error": "a string",
}
"""The expected types by pydantic's kinds of error, in JSON's words."""


def choices(error: ErrorDetails) -> str:
    expected: str = error["ctx"]["expected"]
    return expected.replace("'", "").replace(" or ", ", ")


def json_type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"
