"""Warm-up: requests of sizes that the operator lists, which run before the replica serves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...protocol.errors import StartFailed
from ...protocol.generation import Generate, Sample
from ..caching.caching import Caching
from ..forward.batcher import Batcher
from ..model.model import Model
from .sample import SampleRun

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})(?:x(\d{1,3}))?(?::(\d{1,4}))?")
_STEPS = 2

PROMPTS = tuple(" ".join(["a red circle"] * times) for times in (1, 16, 40))
"""Texts of three lengths, also in models that pad texts to a multiple."""


@dataclass(frozen=True, slots=True)
class WarmUpSize:
    """A request for ``outputs`` pictures or clips of ``width`` by ``height`` pixels, or of the model's own size."""

    width: int | None = None
    height: int | None = None
    outputs: int = 1
    frames: int | None = None

    def __str__(self) -> str:
        if self.width is None:
            return "the model's own size"
        frames = "" if self.frames is None else f":{self.frames}"
        return f"{self.width}x{self.height}x{self.outputs}{frames}"


def read_sizes(option: str, text: str) -> list[WarmUpSize]:
    """The sizes in ``text``, the value of ``option``. Raises ``StartFailed``."""
    sizes = list[WarmUpSize]()
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = _SIZE.fullmatch(word)
        if match is None or match[3] == "0":
            raise StartFailed(
                f"{option} has {word!r}; each size is WIDTHxHEIGHT or WIDTHxHEIGHTxOUTPUTS, as 1024x1024x4, and the "
                "frames of a clip follow after a colon, as 832x480:33."
            )
        sizes.append(WarmUpSize(int(match[1]), int(match[2]), int(match[3] or 1), int(match[4]) if match[4] else None))
    return sizes


def run_size(
    model: Model, batcher: Batcher, caching: Caching | None, option: str, size: WarmUpSize, prompt: str = PROMPTS[0]
) -> None:
    """Run the request for ``size``, from a prompt alone. Raises ``StartFailed``."""
    runs = [
        SampleRun(model, request, 0, lambda *_: None, lambda _: None, caching=caching)
        for request in _requests(model, size, prompt)
    ]
    for run in runs:
        batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    for run in runs:
        if isinstance(error := run.coroutine.error, StartFailed):
            raise error
        if error is not None:
            raise StartFailed(f"{size} of {option} does not run: {error}") from error


def _requests(model: Model, size: WarmUpSize, prompt: str) -> Sequence[Generate]:
    steps = _STEPS if "num_inference_steps" in model.main.arguments else None
    return [
        Generate(
            request_id=f"warm-up-{index}",
            samples=[Sample(f"{prompt} {index % 10}", seed=index)],  # other prompts of as many tokens
            width=size.width,
            height=size.height,
            num_frames=size.frames,
            num_inference_steps=steps,
        )
        for index in range(size.outputs)
    ]
