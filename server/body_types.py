"""The types of fields that several post-training routes have: texts of an alphabet, numbers in a range, bytes."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Alphabet:
    """The alphabet of a client's text, which may appear in log lines and headers."""

    pattern: re.Pattern[str]
    words: str

    def check(self, text: str) -> str:
        if not self.pattern.fullmatch(text):
            about = {"words": self.words, "text": repr(text[:100])}
            raise PydanticCustomError("alphabet", "should consist of {words}; {text} does not", about)
        return text


WORD = Alphabet(
    re.compile(r"\w[\w .:+/@=,#~()-]*"),
    "letters, digits and any of _ . : + / @ = , # ~ ( ) - and space, a letter first",
)
VERSION = Alphabet(re.compile("[!-~]+( [!-~]+)*"), "visible ASCII characters, with single spaces between them")
ADDRESS = Alphabet(re.compile("[A-Za-z0-9._:%-]+"), "the characters of a host name or an address")
PRINTABLE = Alphabet(
    re.compile("[^\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]+"),
    "characters that can be printed",
)

Name = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(WORD.check)]
Path = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(PRINTABLE.check)]
Address = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(ADDRESS.check)]
Version = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(VERSION.check)]
Modules = Annotated[list[Name], Field(min_length=1, fail_fast=True)]
Alpha = Annotated[float, Field(gt=0, le=1e6)]
Rank = Annotated[int, Field(ge=1, le=1_000_000)]
Seconds = Annotated[float, Field(gt=0, le=86400)]

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
"""Integers that a message can hold: JSON has no limit of its own."""

Int64s = Annotated[list[Int64], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
TensorNames = Annotated[list[Path], Field(fail_fast=True)]


def _decoded(value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise PydanticCustomError("base64", "should be base64") from None


Encoded = Annotated[bytes, BeforeValidator(_decoded), WithJsonSchema({"type": "string", "contentEncoding": "base64"})]
"""Bytes, which are base64 in JSON."""


def _first_wrong(value: Any) -> Any:
    """A map may have as many values as a model has tensors, and pydantic would collect an error for each."""
    if isinstance(value, dict) and not all(isinstance(item, str) for item in value.values()):
        raise PydanticCustomError("digests", "should be an object whose values are strings")
    return value


Digests = Annotated[dict[str, str], BeforeValidator(_first_wrong)]
"""SHA-256, in hex, by the tensor's name."""
