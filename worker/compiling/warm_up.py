"""Warm-up: requests of the sizes that the operator lists, made before the replica serves, so that they are compiled."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...protocol.errors import StartFailed
from ...protocol.generation import Generate, Sample

log = logging.getLogger(__name__)

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})(?:x(\d{1,3}))?")
_PROMPT = "a red circle"
STEPS = 2


@dataclass(frozen=True, slots=True)
class WarmUpSize:
    """A forward of ``outputs`` pictures of ``width`` by ``height`` pixels."""

    width: int
    height: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.outputs}"

    def request(self, *, takes_steps: bool) -> Generate:
        return Generate(
            request_id=f"warm-up-{self}",
            samples=[Sample(_PROMPT, seed=index) for index in range(self.outputs)],
            width=self.width,
            height=self.height,
            num_inference_steps=STEPS if takes_steps else None,
        )


def read_sizes(text: str) -> Sequence[WarmUpSize]:
    """The sizes of ``--compile-sizes``. Raises ``StartFailed``."""
    return list(_read(text))


def _read(text: str) -> Iterator[WarmUpSize]:
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = _SIZE.fullmatch(word)
        if match is None:
            raise StartFailed(
                f"--compile-sizes has {word!r}; each size is WIDTHxHEIGHT or WIDTHxHEIGHTxOUTPUTS, as 1024x1024x4."
            )
        yield WarmUpSize(int(match[1]), int(match[2]), int(match[3] or 1))
