"""The body of ``POST /encode``: the fields of ``/generate`` that reach the text encoders, and what to return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Request
from pydantic import Field
from pydantic_core import ErrorDetails

from ..protocol.errors import SafelightError
from ..protocol.fields import TABLE
from ..protocol.generation import EncodingResult
from .body_validation import Body, decode, refuse_query
from .bounded import MAX_VALUES, read_body
from .schemas import MOST_ADAPTERS, GenerateBody, LoraUse, Texts, one_or_list, with_fields

_FIELDS = ("guidance_scale", "true_cfg_scale", "negative_prompt", "priority", "timeout_s", "deterministic", "extra")
_TABLE = {name: TABLE[name] for name in _FIELDS}


@with_fields(_TABLE)
class EncodeBody(Body, json_schema_extra={"example": {"prompt": "a red circle", "return": "embeddings"}}):
    """An encode-only request. Guidance and `extra` decide what is encoded, as in the generations that follow."""

    prompt: Annotated[Texts, one_or_list("string")] = Field(
        description="What to encode; a list makes one result per prompt"
    )
    lora: list[LoraUse] | None = Field(
        None,
        max_length=MOST_ADAPTERS,
        description="Adapters of this request alone, in place of those that are active beside the weights",
    )
    returns: EncodingResult = Field(
        "cache", alias="return", description="Keep the embeddings for later generations, or also return them"
    )

    @classmethod
    def explain(cls, error: ErrorDetails, value: Mapping[str, Any]) -> SafelightError:
        """As of a generation's body."""
        return GenerateBody.explain(error, value)

    def as_generation(self) -> GenerateBody:
        """The generation whose prompts are encoded."""
        given = {name: getattr(self, name) for name in ("prompt", "lora", *_FIELDS)}
        return GenerateBody(**given)


async def read_encode(request: Request) -> EncodeBody:
    """The body. Raises ``Malformed``, ``InvalidRequest`` and ``BodyTooLarge``."""
    refuse_query(request)
    return await decode(await read_body(request), EncodeBody, MAX_VALUES)
