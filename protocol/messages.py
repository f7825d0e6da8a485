"""Every message between server, scheduler and worker.

The life of one request in messages::

    server ──Generate──▶ scheduler ──Generate──▶ worker
    server ◀──Queued, Started, Progress, Preview, then Result or Failed── (in this order)
    server ──Cancel──▶ scheduler ──Cancel──▶ worker
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .adapters import AdapterState, Drawn, Use
from .codec import Buffer, Codec
from .costs import Measured
from .errors import ErrorInfo
from .operations import (
    AbortRequests,
    Continue,
    ListAdapters,
    Operate,
    Operated,
    Pause,
    Perform,
    Performed,
    Report,
    SetPaused,
)
from .rollouts import RolledOut, Rollout

OutputFormat = Literal["png", "jpeg", "webp", "mp4", "webm", "pt"]
BatchingMode = Literal["merged", "interleaved", "serial"]


class Sample(msgspec.Struct, frozen=True):
    """One output to make: a prompt and the seed of its generator."""

    prompt: str
    seed: int


class Image(msgspec.Struct, frozen=True):
    """A picture that a request brings along: rows of RGB, 8 bits each, from the top left."""

    width: int
    height: int
    rgb: Buffer


class Generate(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Make ``samples``, all of them from the same ``images``. ``None`` leaves a value to the pipeline's own default."""

    request_id: str
    samples: list[Sample]
    images: list[Image] = []
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    output_format: OutputFormat = "png"
    deterministic: bool = False
    preview_every: int = 0
    progress: bool = False
    extra: dict[str, Any] = {}
    priority: int = 0
    timeout_s: float | None = None
    lora: list[Use] | None = None
    """The adapters of this request; ``None`` for those that are active for all."""
    rollout: Rollout | None = None
    """That it is sampled as a rollout, and what is to be recorded."""


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Stop a request's work at its next boundary. A request that is unknown or done is ignored."""

    request_id: str


class ReplicaExited(msgspec.Struct, tag=True, frozen=True):
    """The supervisor saw a replica's process end; ``message`` says how."""

    replica: int
    message: str


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
    """What output ``output`` looks like after ``step`` steps, as a JPEG."""

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
    """In place of ``data``, of a rollout."""


class Timings(msgspec.Struct, frozen=True):
    """Seconds; of several outputs, from the first one's begin to the last one's end of each phase.

    ``total_s`` is measured where the request entered that process.
    """

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    total_s: float


class Result(msgspec.Struct, tag=True, frozen=True):
    """All outputs of a request, in the order of its samples.

    ``weight_version`` is the last one that made any of them, and ``weight_versions`` are all, in their order;
    ``adapters`` are all that had a part in any.
    """

    request_id: str
    outputs: list[Output]
    timings: Timings
    steps: int
    weight_version: str
    weight_versions: list[str] = []
    adapters: list[Drawn] = []


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The request ended without a result. Of an operation, ``report`` has the details, if there are any."""

    request_id: str
    error: ErrorInfo
    report: Report | None = None


class Parameter(msgspec.Struct, frozen=True):
    """One argument of the pipeline's ``__call__`` that a request may set.

    ``types`` are JSON types ("int", "float", "str", "bool", "list", "null"); ``default`` is what a request gets that
    leaves it out (null where the pipeline decides), and ``maximum`` the largest value that makes sense for this model,
    where one is known. Of a list, ``items`` are the JSON types of its elements, empty where any will do, and ``length``
    is the only one it may have; the pipeline gets it as a tuple where ``is_tuple``. ``is_required`` is what the
    pipeline does not run without, as the self-test found out, although its signature has a default.
    """

    types: list[str]
    default: Any = None
    maximum: int | None = None
    items: list[str] = []
    length: int | None = None
    is_tuple: bool = False
    is_required: bool = False


class Batching(msgspec.Struct, frozen=True):
    """How requests share forwards, and what the self-test saw that decided it."""

    mode: BatchingMode
    reason: str


class ImageTask(msgspec.Struct, frozen=True, kw_only=True):
    """What a model does with a request that brings images: one for each of ``image_arguments``, in this order.

    Where there is one argument alone, it takes ``several_images`` for one output, or only one.
    """

    pipeline: str
    arguments: dict[str, Parameter]
    size_multiple: int
    image_arguments: tuple[str, ...] = ("image",)
    several_images: bool
    supports_preview: bool
    batching: Batching
    deterministic_defaults: dict[str, Any] = {}


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica serves. Sizes are in pixels; ``parameters`` maps a component to its number of parameters.

    ``pipeline`` and its ``arguments`` are for requests that bring no more than they must: no image, unless the model
    takes no text alone. ``no_image`` says why there is no ``image_task``.
    """

    model: str
    path: str
    pipeline: str
    kind: Literal["image", "video"]
    device: str
    dtype: str
    parameters: dict[str, int]
    arguments: dict[str, Parameter]
    size_multiple: int
    default_width: int | None = None
    default_height: int | None = None
    default_num_frames: int | None = None
    default_fps: int | None = None
    deterministic_defaults: dict[str, Any] = {}
    """Arguments whose default is another one for a ``deterministic`` request: that of diffusers itself."""
    supports_preview: bool = True
    takes_text_alone: bool = True
    image_task: ImageTask | None = None
    no_image: str | None = None
    no_rollout: str | None = None
    """Why it cannot be rolled out; ``None`` where it can."""
    batching: Batching
    weight_version: str
    divided: dict[str, str] = {}
    """How tensor-parallel ranks share each component with weights, and why one or a part of it is whole on each."""
    gpus: list[str] = []
    """UUIDs of the GPUs that its processes see."""


class ReplicaStats(msgspec.Struct, frozen=True):
    """Counters since the replica's start. ``calls / forwards`` is how many calls met in a forward.

    ``costs`` are the seconds of one call to each component, by the size of the output. ``unmergeable`` names calls that
    run alone though others merge, and why: found by the self-test, or since.
    """

    running: int = 0
    forwards: int = 0
    calls: int = 0
    outputs: int = 0
    cancelled: int = 0
    failed: int = 0
    unmergeable: dict[str, str] = {}
    caps: dict[str, int] = {}
    stages: list[str] = []
    costs: dict[str, list[Measured]] = {}


class ReplicaLoading(msgspec.Struct, tag=True, frozen=True):
    """A worker is alive and at ``stage`` of its start."""

    replica: int
    pid: int
    stage: str


class ReplicaReady(msgspec.Struct, tag=True, frozen=True):
    """A worker has loaded its model and finished the self-test's real forwards: it takes requests."""

    replica: int
    pid: int
    model: ModelInfo


class ReplicaFailed(msgspec.Struct, tag=True, frozen=True):
    """A worker cannot start; the message is for the person who started the server."""

    replica: int
    message: str


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Sent about every second by a thread of a worker's process, whatever its loop is doing.

    ``progress`` counts what the loop has done: where it stands still, the loop does. ``forward_s`` is for how long the
    forward in hand has run; ``None`` between forwards. It comes over a socket of its own, and so maybe before or after
    what the loop sends: ``pid`` says of which process it is.
    """

    replica: int
    pid: int
    stats: ReplicaStats
    progress: int
    forward_s: float | None = None


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's view of a replica. ``state`` is the reason that ``/health`` gives."""

    replica: int
    state: Literal["starting", "ready", "failed", "lost", "stalled"]
    message: str
    pid: int | None = None
    outstanding: int = 0
    stats: ReplicaStats = ReplicaStats()
    model: ModelInfo | None = None


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """An operation that holds back the requests and operations that came after it.

    ``phase`` says what it waits for: "draining" for requests that came before it, "working" for replicas, and "open",
    of a begun update, for its client; it is then aborted after ``ends_in_s`` seconds more.
    """

    operation: str
    phase: Literal["draining", "working", "open"]
    held_s: float
    update_id: str | None = None
    ends_in_s: float | None = None


class Status(msgspec.Struct, tag=True, frozen=True):
    """Pushed to the server whenever a replica changes state, a hold begins or ends, and about every second.

    ``halted`` is why no request is started, though replicas are ready: "asleep" or "paused", for ``halted_s`` seconds.
    ``queued_bytes`` are those of waiting requests and operations. ``adapters`` are what is committed. ``heard`` counts
    the messages that the scheduler has taken from the server.
    """

    queued: int
    running: int
    replicas: list[ReplicaStatus]
    halted: str | None = None
    adapters: AdapterState = AdapterState()
    halted_s: float = 0.0
    hold: Hold | None = None
    queued_operations: int = 0
    queued_bytes: int = 0
    heard: int = 0


ToScheduler = Generate | Cancel | ReplicaExited | Operate | Pause | Continue | AbortRequests | ListAdapters
FromScheduler = Queued | Started | Progress | Preview | Result | Failed | Operated | Status
ToWorker = Generate | Cancel | Perform | SetPaused
FromWorker = (
    ReplicaLoading | ReplicaReady | ReplicaFailed | Heartbeat | Progress | Preview | Result | Failed | Performed
)

TO_SCHEDULER: Codec[ToScheduler] = Codec(ToScheduler)
FROM_SCHEDULER: Codec[FromScheduler] = Codec(FromScheduler)
TO_WORKER: Codec[ToWorker] = Codec(ToWorker)
FROM_WORKER: Codec[FromWorker] = Codec(FromWorker)
