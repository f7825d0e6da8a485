"""Messages about replicas: what one serves, how it starts, and how it does."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .adapters import AdapterState
from .compiling import CompiledComponentStats
from .costs import Measured

BatchingMode = Literal["merged", "interleaved", "serial"]


class ReplicaExited(msgspec.Struct, tag=True, frozen=True):
    """The supervisor saw a replica's process end; ``message`` says how."""

    replica: int
    message: str


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


class Attention(msgspec.Struct, frozen=True):
    """The attention backend, as diffusers names it, and why; ``deterministic`` requests have their own."""

    backend: str
    reason: str
    deterministic: str


class Accuracy(msgspec.Struct, frozen=True):
    """The largest relative L2 distance of a quantized component's outputs, and of the plain one's in the same dtype.

    Both are from the component with the checkpoint's weights that computes in ``reference``.
    """

    relative_l2: float
    plain: float
    reference: str


class Quantized(msgspec.Struct, frozen=True):
    """A quantized component on one rank: bytes on the device of its quantized weights before and after.

    ``base_on_host_bytes`` are those of the checkpoint's values that are not in its files as the model has them.
    """

    scheme: str
    layers: int
    bytes_before: int
    bytes_after: int
    base_on_host_bytes: int
    accuracy: Accuracy | None = None


class Offloaded(msgspec.Struct, frozen=True):
    """An offloaded component on one rank: its bytes in host memory, and on the device while it computes.

    Of its ``streamed_blocks`` two are on the device at a time; 0 if it comes there whole.
    """

    host_bytes: int
    device_bytes: int
    streamed_blocks: int


class ImageTask(msgspec.Struct, frozen=True, kw_only=True):
    """The task for requests with images: one for each of ``image_arguments``, in this order.

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
    """The model of a replica. Sizes are in pixels; ``parameters`` maps a component to its number of parameters.

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
    attention: Attention | None = None
    quantized: dict[str, Quantized] = {}
    offloaded: dict[str, Offloaded] = {}
    weight_version: str
    divided: dict[str, str] = {}
    """How tensor-parallel ranks share each component with weights, and why one or a part of it is whole on each."""
    gpus: list[str] = []
    """UUIDs of the GPUs that its processes see."""


class GraphStats(msgspec.Struct, frozen=True):
    """CUDA graphs of a replica: whether they are in use, or why not, and counters since its start.

    ``captures``, ``replays`` and ``misses`` count calls of blocks; a miss ran eagerly. ``evictions`` are shapes that
    were dropped for lack of memory, ``shapes`` and ``mb`` those in memory now. ``eager`` has the reasons for which
    blocks run eagerly though their shapes come again.
    """

    state: Literal["on", "off"] = "off"
    reason: str = ""
    captures: int = 0
    replays: int = 0
    misses: int = 0
    evictions: int = 0
    shapes: int = 0
    mb: float = 0.0
    eager: list[str] = []


class MergeLimit(msgspec.Struct, frozen=True):
    """At most so many ``outputs`` share a forward of calls of ``name`` with so many ``positions`` each.

    ``seconds`` are those of one call, by the number of outputs in the forward.
    """

    name: str
    positions: int
    outputs: int
    seconds: dict[str, float] = {}


class ReplicaStats(msgspec.Struct, frozen=True):
    """Counters since the replica's start. ``calls / forwards`` is how many calls met in a forward.

    ``costs`` are the seconds of one output's forward, by component and size. ``unmergeable`` names calls that
    run alone though others merge, and why: found by the self-test, or since. ``caps`` are limits on positions after a
    lack of memory, ``merge_limits`` those on outputs by measured times. ``predicted_calls`` were made beside the first
    call of a step by guidance pairing, and the ``missed_predictions`` among them never came. Step caches answered
    ``skipped_forwards`` calls. ``tiled_calls`` were computed in tiles. The ranks have shared the rows of
    ``divided_forwards``. ``compiled`` has the components whose blocks are compiled.
    """

    running: int = 0
    forwards: int = 0
    calls: int = 0
    outputs: int = 0
    cancelled: int = 0
    failed: int = 0
    unmergeable: dict[str, str] = {}
    caps: dict[str, int] = {}
    merge_limits: list[MergeLimit] = []
    stages: list[str] = []
    costs: dict[str, list[Measured]] = {}
    predicted_calls: int = 0
    missed_predictions: int = 0
    tiled_calls: int = 0
    graphs: GraphStats = GraphStats()
    divided_forwards: int = 0
    compiled: dict[str, CompiledComponentStats] = {}
    skipped_forwards: int = 0


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

    ``progress`` counts the loop's work: it stands still if the loop does. ``forward_s`` is the age of the current
    forward, ``None`` between forwards. Heartbeats have a socket of their own, so they may overtake or follow messages
    of the loop: ``pid`` identifies the process.
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
