"""Typed replies: generations and their outputs, events of a stream, weight updates, adapters.

Pictures arrive as base64 in JSON and are decoded to bytes. A notebook displays them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ..protocol.adapters import Drawn
from ..protocol.generation import Timings
from ..protocol.output_formats import FORMATS, OutputFormat
from . import notebook
from .pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES: dict[str, OutputFormat] = {suffix: name for name, one in FORMATS.items() for suffix in one.suffixes}
"""``output_format`` by file suffix."""


class Output(msgspec.Struct, frozen=True):
    """One picture, clip or tensor, encoded as ``format``; sizes are in pixels, ``fps`` in frames per second."""

    data: bytes = msgspec.field(name="b64")
    format: OutputFormat
    seed: int
    width: int
    height: int
    num_frames: int | None = None
    fps: int | None = None

    @property
    def image(self) -> Image:
        """The picture. Raises ``ValueError`` for a clip or a tensor."""
        if FORMATS[self.format].holds != "image":
            raise ValueError(f"an output of format {self.format} is not a picture; write it to a file with save()")
        return open_picture(self.data)

    def save(self, path: str | Path) -> Path:
        """Write the output to ``path``; a picture is converted if the suffix names another picture format."""
        path = Path(path)
        wanted = SUFFIXES.get(path.suffix.lower(), self.format)
        if wanted == self.format or not FORMATS[wanted].holds == FORMATS[self.format].holds == "image":
            path.write_bytes(self.data)
        else:
            self.image.convert("RGB").save(path, format=wanted, quality=95)
        return path

    def __repr__(self) -> str:
        clip = "" if self.num_frames is None else f", {self.num_frames} frames at {self.fps} fps"
        return f"Output({self.format}, {self.width}x{self.height}{clip}, seed {self.seed}, {len(self.data)} bytes)"

    def _repr_png_(self) -> bytes | None:
        return self.data if self.format == "png" else None

    def _repr_html_(self) -> str:
        return notebook.element(self.data, self.format, self.width, repr(self))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return notebook.bundle(repr(self), self._repr_html_(), self._repr_png_())


class Generation(msgspec.Struct, frozen=True):
    """The reply to one request: its outputs, in the order of prompts and seeds, and the weights that made them.

    ``weight_versions`` are all versions that took part (an update of mode ``in_place`` changes weights between steps),
    ``weight_version`` is the last. ``adapters`` were active. ``skipped_forwards`` are those that the step cache saved.
    """

    id: str
    model: str
    weight_version: str
    outputs: tuple[Output, ...]
    timings: Timings
    steps: int
    weight_versions: tuple[str, ...] = ()
    adapters: tuple[Drawn, ...] = ()
    skipped_forwards: int = 0

    @property
    def image(self) -> Image:
        """The first output's picture."""
        return self.outputs[0].image

    def _repr_html_(self) -> str:
        figures = [(output._repr_html_(), f"seed {output.seed}") for output in self.outputs]
        weights = f"{self.model}, weights {self.weight_version}"
        return notebook.gallery(figures, f"{weights}, {self.steps} steps, {self.timings.total_s:.2f} s")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        png = self.outputs[0]._repr_png_() if len(self.outputs) == 1 else None
        return notebook.bundle(repr(self), self._repr_html_(), png)


class Queued(msgspec.Struct, frozen=True):
    """The request was accepted; ``position`` requests are ahead of it."""

    position: int


class Progress(msgspec.Struct, frozen=True):
    """Output ``output`` has finished ``step`` of ``steps`` denoising steps."""

    output: int
    step: int
    steps: int


class Preview(msgspec.Struct, frozen=True):
    """A JPEG of output ``output`` after ``step`` of ``steps`` steps."""

    output: int
    step: int
    steps: int
    data: bytes = msgspec.field(name="b64")

    @property
    def image(self) -> Image:
        return open_picture(self.data)

    def __repr__(self) -> str:
        return f"Preview(output {self.output}, step {self.step} of {self.steps}, {len(self.data)} bytes)"

    def _repr_jpeg_(self) -> bytes:
        return self.data


class Result(msgspec.Struct, frozen=True):
    """The last event of a successful stream."""

    generation: Generation


Event = Queued | Progress | Preview | Result


class Health(msgspec.Struct, frozen=True):
    """``ready`` once a replica has finished a real forward; until then ``reason`` says in a line what is missing."""

    ready: bool
    reason: str
    answers: bool = True
    """False where nothing answered."""


class ActiveLora(msgspec.Struct, frozen=True):
    """An adapter of one component, active for all requests; in mode ``merge`` it has no effect until ``merged``."""

    nickname: str
    path: str | None
    merged: bool
    mode: Literal["merge", "dynamic"]
    strength: float


class WeightUpdate(msgspec.Struct, frozen=True):
    """A committed update, on every rank of every replica.

    ``updated`` counts the tensors written per module, ``applied`` is their sum, and the modules have ``expected``
    tensors in total. ``elapsed_s`` counts from the start to the server's reply; ``invalidated`` names the caches that
    were flushed. ``left_out`` names tensors that checkpoints lack because the model creates them itself. If the server
    does not serve the new weights (``serving``), ``message`` says why. ``adapters`` are active by component and change
    outputs too.
    """

    updated: dict[str, int]
    applied: int
    expected: int
    weight_version: str | None
    ranks: int
    elapsed_s: float
    invalidated: tuple[str, ...]
    adapters: dict[str, tuple[ActiveLora, ...]] = {}
    left_out: tuple[str, ...] = ()
    serving: bool = True
    message: str = ""


class UpdateProgress(msgspec.Struct, frozen=True):
    """``sent`` of ``total`` bytes were sent; ``total`` is ``None`` while it is unknown."""

    sent: int
    total: int | None


class LoadedLora(msgspec.Struct, frozen=True):
    """An adapter that the server has loaded; ``path`` is ``None`` for an adapter sent as tensors.

    ``left`` names layers of its file that the model lacks and that ``strict=False`` skipped.
    """

    nickname: str
    path: str | None
    rank: int
    alpha: float
    bytes: int
    components: tuple[str, ...]
    left: tuple[str, ...] = ()


class Loras(msgspec.Struct, frozen=True):
    """The server's adapters, and the active ones by component; ``message`` describes the last change."""

    loaded: tuple[LoadedLora, ...] = msgspec.field(name="loaded_adapters")
    active: dict[str, tuple[ActiveLora, ...]]
    message: str = ""
