"""The body of ``POST /generate``: its fields and their types, and what is told about a body that is none.

Types are checked here and exactly (``true`` is no integer, ``"4"`` is no number); ranges, and what the model can do,
are checked in :mod:`.limits`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, create_model
from pydantic_core import ErrorDetails

from ..protocol.errors import InvalidRequest, Malformed, SafelightError
from ..protocol.fields import TABLE, Settings
from ..protocol.output_formats import OutputFormat

M = TypeVar("M", bound=BaseModel)

_MOST_ADAPTERS = 16
_MOST_ITEMS = 4096  # no configuration allows more outputs, so no list may be longer


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _one_or_list(item: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": item}, {"type": "array", "items": {"type": item}}]})


_ITEMS = Field(min_length=1, max_length=_MOST_ITEMS, fail_fast=True)
Texts = Annotated[list[str], _ITEMS, BeforeValidator(_as_list)]
Seeds = Annotated[list[int], _ITEMS, BeforeValidator(_as_list)]


class LoraUse(BaseModel):
    """A loaded adapter, by its nickname."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=1000)
    scale: float = Field(1.0, ge=-100, le=100, description="How strongly it is added")


def with_settings(form: type[M]) -> type[M]:
    """``form`` with the fields of :class:`.fields.Settings`, their types and their help."""
    fields: dict[str, Any] = {
        row.name: (row.type, Field(row.default, description=row.field.help)) for row in TABLE.values()
    }
    made: type[M] = create_model(
        form.__name__, __base__=form, __module__=form.__module__, __doc__=form.__doc__, **fields
    )
    return made


@with_settings
class GenerateBody(BaseModel):
    """What to make. Everything but the prompt has a default, most of them the pipeline's own."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: Annotated[Texts, _one_or_list("string")] = Field(
        description="What to show; a list makes one result per prompt"
    )
    seed: Annotated[Seeds, _one_or_list("integer")] | None = Field(
        None,
        description="Output i of n uses seed + i; a list has one per prompt, or one per output; "
        "chosen at random and returned when omitted",
    )
    n: int = Field(1, description="Outputs per prompt")
    num_outputs_per_prompt: int | None = Field(None, description="The same as `n`")
    image: Annotated[Texts, _one_or_list("string")] | None = Field(
        None,
        description="What to start from or to change: a PNG, JPEG or WebP as a data URI or base64, never an address; "
        "a list where the model takes several for one output",
    )
    lora: list[LoraUse] | None = Field(
        None,
        max_length=_MOST_ADAPTERS,
        description="Adapters of this request alone, in place of those that are active beside the weights",
    )
    output_format: OutputFormat | None = Field(None, description="png for pictures and mp4 for videos when omitted")
    stream: bool = Field(False, description="Answer with server-sent events: queued, progress, preview, result, error")

    @property
    def settings(self) -> Settings:
        """The fields that reach a worker as they are."""
        return Settings(**{name: getattr(self, name) for name in TABLE})


B = TypeVar("B", bound=GenerateBody)


def parse_generate(body: bytes | bytearray) -> GenerateBody:
    """The fields in ``body``, whatever its content type says. Raises as :func:`validate` does."""
    return validate(read_object(body), GenerateBody)


def read_object(body: bytes | bytearray) -> dict[str, Any]:
    """A JSON object. Raises ``Malformed``."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Malformed(f"The body cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise Malformed(f"The body must be a JSON object, not {_json_type(value)}.")
    return value


def validate(value: dict[str, Any], form: type[B]) -> B:
    """The fields in ``value``, as ``form`` has them.

    Raises ``Malformed`` for what has not these fields and types, ``InvalidRequest`` for a wrong choice.
    """
    for name in value:
        if name not in form.model_fields:  # pydantic would collect an error for each of many
            shown = name[:100]
            raise Malformed(f"There is no field {shown!r}; {near(name, form.model_fields)}", field=shown)
    try:
        return form.model_validate({name: _as_written(item) for name, item in value.items()})
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0], value) from None


def near(name: str, known: Collection[str]) -> str:
    """What ``name`` may have been meant to be, as the end of a sentence."""
    close = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(sorted(known)) or 'none'}."


def _as_written(value: Any) -> Any:
    """Undo that orjson reads an integer beyond 64 bits as a float: it is out of range, not of a wrong type."""
    if isinstance(value, list) and len(value) <= _MOST_ITEMS:
        return [int(item) if _is_beyond(item) else item for item in value]
    return int(value) if _is_beyond(value) else value


def _is_beyond(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and abs(value) >= 2**63


def _explain(error: ErrorDetails, body: dict[str, Any]) -> SafelightError:
    field = str(error["loc"][0])
    if field == "lora":
        return _explain_adapters(error, body)
    index = error["loc"][1:] if isinstance(body.get(field), list) else ()
    place = field + "".join(f"[{part}]" for part in index)
    match error["type"]:
        case "missing":
            return Malformed(f"The field {field} is required.", field=field)
        case "literal_error" if isinstance(error["input"], str):
            return InvalidRequest(f"{place} must be one of {_choices(error)}.", field=field)
        case "too_short" | "too_long":
            return InvalidRequest(f"{field} must have between 1 and {_MOST_ITEMS} elements.", field=field)
        case kind:
            expected = _EXPECTED.get(kind, "something else")
            if len(error["loc"]) > 1 and not index:
                expected += " or a list of them"
            return Malformed(f"{place} must be {expected}, not {_json_type(error['input'])}.", field=field)


def _explain_adapters(error: ErrorDetails, body: dict[str, Any]) -> SafelightError:
    _, *where = error["loc"]
    place = "lora" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    match error["type"]:
        case "extra_forbidden":
            return Malformed(f"There is no {place[:200]}; an adapter has a name and a scale.", field="lora")
        case "missing":
            return Malformed(f"{place} is required.", field="lora")
        case "too_long":
            return InvalidRequest(f"lora may name at most {_MOST_ADAPTERS} adapters.", field="lora")
        case "greater_than_equal" | "less_than_equal" | "string_too_short" | "string_too_long":
            return InvalidRequest(
                f"{place} is out of range: a scale is within ±100, a name has characters.", field="lora"
            )
        case kind:
            expected = _EXPECTED.get(kind, "an object" if where else "a list of objects with a name and a scale")
            return Malformed(f"{place} must be {expected}, not {_json_type(error['input'])}.", field="lora")


_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "dict_type": "an object",
    "literal_error": "a string",
}
"""What pydantic's kinds of error expected, in JSON's words."""


def _choices(error: ErrorDetails) -> str:
    expected: str = error["ctx"]["expected"]
    return expected.replace("'", "").replace(" or ", ", ")


def _json_type(value: Any) -> str:
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
