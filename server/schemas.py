"""The body of ``POST /generate``: its fields and their types. Ranges are checked in :mod:`.request_validation`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, create_model
from pydantic_core import ErrorDetails

from ..protocol.errors import InvalidRequest, Malformed, SafelightError
from ..protocol.fields import TABLE, Settings, Table
from ..protocol.output_formats import OutputFormat
from .body_validation import EXPECTED, MOST_ITEMS, Body, choices, json_type, read_object, validate

M = TypeVar("M", bound=BaseModel)

MOST_ADAPTERS = 16


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def one_or_list(item: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": item}, {"type": "array", "items": {"type": item}}]})


LIST = Field(max_length=MOST_ITEMS, fail_fast=True)
_ITEMS = Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)
Texts = Annotated[list[str], _ITEMS, BeforeValidator(_as_list)]
Seeds = Annotated[list[int], _ITEMS, BeforeValidator(_as_list)]


class LoraUse(Body):
    """A loaded adapter, by its nickname."""

    name: str = Field(min_length=1, max_length=1000)
    scale: float = Field(1.0, ge=-100, le=100, description="How strongly it is added")


def with_fields(table: Table) -> Callable[[type[M]], type[M]]:
    """Give a model the fields of ``table``, with their types and their help."""
    fields: dict[str, Any] = {
        name: (_bounded(row.type), Field(row.default, description=row.field.help)) for name, row in table.items()
    }

    def decorate(form: type[M]) -> type[M]:
        made: type[M] = create_model(
            form.__name__, __base__=form, __module__=form.__module__, __doc__=form.__doc__, **fields
        )
        return made

    return decorate


def _bounded(kind: Any) -> Any:
    """``kind`` with a bound on its list, for each of whose items pydantic would collect an error."""
    lists = [one for one in get_args(kind) if get_origin(one) is list]
    return Annotated[lists[0], LIST] | None if lists else kind


@with_fields(TABLE)
class GenerateBody(Body, json_schema_extra={"example": {"prompt": "a red circle", "seed": 7}}):
    """A generation request. Everything but the prompt has a default, mostly the pipeline's own."""

    prompt: Annotated[Texts, one_or_list("string")] = Field(
        description="What to show; a list makes one result per prompt"
    )
    seed: Annotated[Seeds, one_or_list("integer")] | None = Field(
        None,
        description="Output i of n uses seed + i; a list has one per prompt, or one per output; "
        "chosen at random and returned when omitted",
    )
    n: int = Field(1, description="Outputs per prompt")
    num_outputs_per_prompt: int | None = Field(None, description="The same as `n`")
    image: Annotated[Texts, one_or_list("string")] | None = Field(
        None,
        description="What to start from or to change: a PNG, JPEG or WebP as a data URI or base64, never an address; "
        "a list where the model takes several for one output",
    )
    lora: list[LoraUse] | None = Field(
        None,
        max_length=MOST_ADAPTERS,
        description="Adapters of this request alone, in place of those that are active beside the weights",
    )
    output_format: OutputFormat | None = Field(None, description="png for pictures and mp4 for videos when omitted")
    stream: bool = Field(False, description="Answer with server-sent events: queued, progress, preview, result, error")

    @functools.cached_property
    def settings(self) -> Settings:
        """The fields that reach a worker as they are."""
        return Settings(**{name: getattr(self, name) for name in TABLE})

    @classmethod
    def explain(cls, error: ErrorDetails, value: Mapping[str, Any]) -> SafelightError:
        """As of any body, but a value that is out of range is a 400 here."""
        field = str(error["loc"][0])
        if field == "lora":
            return _explain_adapters(error)
        if error["type"] == "literal_error" and isinstance(error["input"], str):
            return InvalidRequest(f"{field} must be one of {choices(error)}.", field=field)
        if error["type"] in ("too_short", "too_long"):
            return InvalidRequest(f"{field} must have between 1 and {MOST_ITEMS} elements.", field=field)
        return super().explain(error, value)


def parse_generate(body: bytes | bytearray) -> GenerateBody:
    """The fields in ``body``, whatever its content type says. Raises as :func:`validate` does."""
    return validate(read_object(body), GenerateBody)


def _explain_adapters(error: ErrorDetails) -> SafelightError:
    _, *where = error["loc"]
    place = "lora" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    match error["type"]:
        case "extra_forbidden":
            return Malformed(f"There is no {place[:200]}; an adapter has a name and a scale.", field="lora")
        case "missing":
            return Malformed(f"{place} is required.", field="lora")
        case "too_long":
            return InvalidRequest(f"lora may name at most {MOST_ADAPTERS} adapters.", field="lora")
        case "greater_than_equal" | "less_than_equal" | "string_too_short" | "string_too_long":
            return InvalidRequest(
                f"{place} is out of range: a scale is within ±100, a name has characters.", field="lora"
            )
        case kind:
            expected = EXPECTED.get(kind, "an object") if where else "a list of objects with a name and a scale"
            return Malformed(f"{place} must be {expected}, not {json_type(error['input'])}.", field="lora")
