"""Messages of one generation: the request, its events and its result."""

from __future__ import annotations

from typing import Literal

import msgspec

from .adapters import Drawn, Use
from .codec import Buffer
from .errors import ErrorInfo
from .fields import Settings
from .output_formats import OutputFormat
from .reports import Report
from .rollouts import RolledOut, Rollout


class Sample(msgspec.Struct, frozen=True):
    """One output to make: a prompt and the seed of its generator."""

    prompt: str
    seed: int


class Image(msgspec.Struct, frozen=True):
    """An input picture: rows of RGB with 8 bits each, from the top left."""

    width: int
    height: int
    rgb: Buffer


EncodingResult = Literal["cache", "embeddings"]
"""The result of an encode-only request: nothing, as the prompt cache keeps the embeddings, or the embeddings too."""


class Generate(Settings, tag=True, frozen=True, kw_only=True):
    """Generate ``samples``, all from the same ``images``, with the request's settings."""

    request_id: str
    samples: list[Sample]
    images: list[Image] = msgspec.field(default_factory=list)
    output_format: OutputFormat = "png"
    progress: bool = False
    """Report the request's way to its end: ``Queued``, ``Started``, ``Progress`` and ``Preview``."""
    lora: list[Use] | None = None
    """The adapters of this request; ``None`` uses the active ones."""
    rollout: Rollout | None = None
    """The sampler and the records of a rollout; ``None`` for a plain generation."""
    encode: EncodingResult | None = None
    """Encode the prompts alone, and what to return of them; ``None`` for a generation."""


class GenerateCopies(msgspec.Struct, tag=True, frozen=True):
    """Copies of one request, one for each of ``replicas``: all are accepted, or none.

    They share the request's id, and each has a :class:`Result` or :class:`Failed` of its own.
    """

    request: Generate
    replicas: list[int]


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Stop a request's work at its next boundary. A request that is unknown or done is ignored."""

    request_id: str


class Queued(msgspec.Struct, tag=True, frozen=True):
    """The request was accepted; ``position`` requests are ahead of it."""

    request_id: str
    position: int


class Started(msgspec.Struct, tag=True, frozen=True):
    """The request was given to a replica, after ``queue_s`` seconds."""

    request_id: str
    replica: int
    queue_s: float


class Progress(msgspec.Struct, tag=True, frozen=True):
    """Output ``output`` of the request has finished ``step`` of ``steps`` denoising steps."""

    request_id: str
    output: int
    step: int
    steps: int


class Preview(msgspec.Struct, tag=True, frozen=True):
    """A JPEG of output ``output`` after ``step`` steps."""

    request_id: str
    output: int
    step: int
    steps: int
    image: Buffer


class Output(msgspec.Struct, frozen=True):
    """One finished picture, clip or tensor, encoded as ``format``; ``audio_sample_rate`` of a clip with sound."""

    data: Buffer
    format: OutputFormat
    seed: int
    width: int
    height: int
    num_frames: int | None = None
    fps: int | None = None
    audio_sample_rate: int | None = None
    rolled_out: RolledOut | None = None
    """A rollout's records, in place of ``data``."""


class Timings(msgspec.Struct, frozen=True):
    """Seconds; with several outputs, each phase lasts from the first output's start to the last output's end.

    ``total_s`` is measured where the request entered that process.
    """

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    total_s: float


class Result(msgspec.Struct, tag=True, frozen=True):
    """All outputs of a request, in the order of its samples.

    ``weight_version`` is the last version that took part, ``weight_versions`` are all in order, and ``adapters`` are
    all adapters that took part. ``skipped_forwards`` are the denoiser's calls that the step cache answered.
    """

    request_id: str
    outputs: list[Output]
    timings: Timings
    steps: int
    weight_version: str
    weight_versions: list[str] = []
    adapters: list[Drawn] = []
    skipped_forwards: int = 0


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The request ended without a result; ``report`` may have the details of an operation."""

    request_id: str
    error: ErrorInfo
    report: Report | None = None
