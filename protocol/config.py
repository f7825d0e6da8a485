"""Every option of a server, typed and documented.

The launcher reads them (``process.configuration``) and sends the result to its child processes as one line of JSON on
their standard input.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta


def _option(group: str, description: str, **bounds: Any) -> Meta:
    return Meta(description=description, extra={"group": group}, **bounds)


_model = partial(_option, "model")
_http = partial(_option, "HTTP")
_replicas = partial(_option, "replicas")
_queue = partial(_option, "batching and queue")
_weights = partial(_option, "weights")
_adapters = partial(_option, "adapters")
_asking = partial(_option, "what one request may ask for")
_log = partial(_option, "log")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of one server. ``docs/configuration.md`` is generated from this class."""

    model: Annotated[
        str,
        _model(
            "A directory with a diffusers pipeline, a checkpoint in one file (.safetensors, .gguf), a hub "
            "id, `shapes` or `shapes-video`"
        ),
    ] = "shapes"
    base_pipeline: Annotated[
        str | None,
        _model(
            "The pipeline, a directory or a hub id, that a checkpoint in one file belongs to: it gives the "
            "layout and what is not in the file; when not given, diffusers guesses it"
        ),
    ] = None
    variant: Annotated[
        str | None, _model("Load the weights of this variant, such as fp16, in components that have files of it")
    ] = None
    revision: Annotated[
        str | None, _model("The branch, tag or commit of the hub's repository; main when not given")
    ] = None
    served_model_name: Annotated[
        str | None, _model("The name that clients see; the last part of `model` when not given")
    ] = None
    host: Annotated[str, _http("The address to listen on")] = "127.0.0.1"
    port: Annotated[int, _http("The port to listen on; 0 takes a free one", ge=0, le=65535)] = 30000
    api_key: Annotated[
        str | None,
        _http(
            "When given, every route but the health checks asks for it as a bearer token; every local user "
            "can read a flag in the process list, so better use the variable or `--api-key-file`"
        ),
    ] = None
    api_key_file: Annotated[str | None, _http("A file that holds the API key, and nothing else")] = None
    insecure: Annotated[bool, _http("Listen on addresses that other machines reach although there is no API key")] = (
        False
    )
    admin: Annotated[bool, _http("Have the routes that change the server: weights, adapters, sleep, pause, abort")] = (
        True
    )
    allowed_hosts: Annotated[
        str,
        _http(
            "Host names, separated by commas, that clients may use besides loopback names and the "
            "address it listens on; `*` allows every name"
        ),
    ] = ""
    cors_origins: Annotated[
        str, _http("Origins, separated by commas, whose web pages may call this server, as `https://example.com`")
    ] = ""
    device: Annotated[
        Literal["auto", "cpu", "cuda"], _model("Where the model runs; auto takes CUDA when there is one")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _model(
            "The weights' dtype; auto is bfloat16 on a GPU, and on a CPU that multiplies bfloat16 if the "
            "checkpoint is stored so; else float32"
        ),
    ] = "auto"
    tp: Annotated[
        int, _replicas("Tensor-parallel ranks of each replica: processes that share the model", ge=1, le=64)
    ] = 1
    fuse_projections: Annotated[
        bool, _replicas("Compute layers with one input (queries, keys, values; gate and up) as one product")
    ] = False
    replicas: Annotated[int, _replicas("Copies of the model, each in a process of its own", ge=1, le=64)] = 1
    nursery: Annotated[
        bool,
        _replicas(
            "Fork workers from one process that has imported torch and diffusers, so that they start in a "
            "fraction of the time; only on Linux"
        ),
    ] = True
    self_test_cache: Annotated[
        bool,
        _replicas(
            "Take over what the self-test of an earlier start has found out about the same files, with the "
            "same software and hardware; kept in `safelight/self-tests` below `$XDG_CACHE_HOME`, or `~/.cache`"
        ),
    ] = True
    threads: Annotated[int, _replicas("CPU threads of each replica; 0 divides the cores among them", ge=0, le=1024)] = 0
    batching: Annotated[
        Literal["auto", "merged", "interleaved", "serial"],
        _queue("How requests share forwards; auto lets the self-test at load decide"),
    ] = "auto"
    max_batch: Annotated[int, _queue("Calls that may share one forward", ge=1, le=4096)] = 16
    max_batch_tokens: Annotated[int, _queue("Positions (tokens or latent pixels) that may share one forward", ge=1)] = (
        65536
    )
    prompt_cache_mb: Annotated[
        int, _queue("Megabytes of prompt embeddings that each replica keeps; 0 keeps none", ge=0)
    ] = 256
    max_running: Annotated[
        int, _queue("Outputs in progress at once in one replica; later ones wait in the queue", ge=1, le=4096)
    ] = 32
    max_queue: Annotated[int, _queue("Requests that may wait; one more is answered with 429 and Retry-After", ge=1)] = (
        256
    )
    max_queue_mb: Annotated[
        int,
        _queue(
            "Megabytes that waiting requests may hold, and as many again waiting operations; what would "
            "make them more gets a 429",
            ge=1,
        ),
    ] = 1024
    max_unread_mb: Annotated[
        int,
        _queue(
            "Megabytes of replies, and of rollouts in shared memory, that clients have not taken yet; "
            "while there are more, old files go, and then generations get a 429",
            ge=1,
        ),
    ] = 4096
    max_operations: Annotated[
        int,
        _queue(
            "Operations (updates, digests, changes of adapters) that may wait; one more is answered with "
            "429 and Retry-After",
            ge=1,
        ),
    ] = 64
    max_outputs: Annotated[int, _asking("Outputs that one request may ask for", ge=1, le=4096)] = 64
    max_steps: Annotated[int, _asking("Denoising steps that one request may ask for", ge=1)] = 1000
    max_pixels: Annotated[
        int,
        _asking(
            "Width times height that one output may have; 0: 16 times what the model makes by itself, and "
            "16777216 where that is not known",
            ge=0,
        ),
    ] = 0
    max_forward_s: Annotated[
        float,
        _queue(
            "Seconds that one forward of a request larger than the model's own size may take, estimated "
            "from measured ones; larger requests would hold up all others, and get a 400",
            gt=0,
        ),
    ] = 60.0
    max_frames: Annotated[int, _asking("Frames that one video may have", ge=1)] = 1024
    max_prompt_chars: Annotated[int, _asking("Characters that one prompt may have", ge=1)] = 10_000
    max_connections: Annotated[
        int, _http("Connections that clients may have open; beyond it, one that waits for its client ends", ge=1)
    ] = 4096
    max_body_mb: Annotated[int, _http("Megabytes that a request's body may have", ge=1)] = 64
    max_bodies_mb: Annotated[
        int, _http("Megabytes that the bodies being received may take together; beyond it, a 429", ge=1)
    ] = 1024
    body_timeout_s: Annotated[
        float, _http("Seconds in which a request's body has to arrive, and one more for each megabyte", gt=0)
    ] = 60.0
    max_update_mb: Annotated[int, _weights("Megabytes that the body of a weight update may have", ge=1)] = 65536
    max_update_hold_s: Annotated[
        float,
        _weights(
            "Seconds that a begun update, or one that a trainer broadcasts, may hold back generation; then "
            "the server aborts it",
            gt=0,
        ),
    ] = 1800.0
    pickle_payloads: Annotated[
        bool, _weights("Read `serialized_named_tensors`, streams that trainers pickle; read by an exact allow-list")
    ] = True
    weights_roots: Annotated[
        str,
        _weights(
            "Directories, separated as in PATH, from which weights, and images by their "
            "path, may be read; when not given, the current one and the one that the model lies in"
        ),
    ] = ""
    undo_mb: Annotated[
        int,
        _weights(
            "Megabytes of host memory that each rank may use for what an update overwrites, until it is "
            "committed; 0: half of the machine's memory, divided among all ranks",
            ge=0,
        ),
    ] = 0
    undo_spill: Annotated[str | None, _weights("A directory whose disk takes what does not fit into `--undo-mb`")] = (
        None
    )
    weights_journal: Annotated[
        str | None,
        _weights(
            "A directory that keeps what updates committed, for restarts; without it, weights that were "
            "updated live only as long as a replica that has them"
        ),
    ] = None
    allow_model_source: Annotated[bool, _weights("Let an update from disk name a hub id, which is downloaded")] = False
    lora: Annotated[
        str, _adapters("Adapters to start with, as `name=path`, separated by commas; each is a file or a directory")
    ] = ""
    lora_mode: Annotated[
        Literal["auto", "merge", "dynamic", "request"],
        _adapters("How the adapters of `--lora` are applied; `request` loads them for requests that name them"),
    ] = "auto"
    max_loras: Annotated[
        int, _adapters("Adapters that may be loaded; one more evicts the least recently used", ge=0)
    ] = 64
    max_lora_mb: Annotated[int, _adapters("Megabytes of all loaded and gathered adapters", ge=1)] = 8192
    request_timeout_s: Annotated[
        float, _queue("Seconds after which a request without a `timeout_s` of its own gets a 504", gt=0)
    ] = 600.0
    start_timeout_s: Annotated[
        float, _replicas("Seconds that a replica may take to load before the start counts as failed", gt=0)
    ] = 1800.0
    stall_timeout_s: Annotated[
        float,
        _replicas(
            "Seconds without a heartbeat, or without progress between two forwards, after which a ready "
            "replica is started again; a scheduler that gives no sign of life for as long, and for ten seconds at "
            "least, ends the server",
            gt=0,
        ),
    ] = 120.0
    forward_timeout_s: Annotated[
        float,
        _replicas(
            "Seconds that one forward (a component's call: a denoising step, a VAE's decode of a whole "
            "clip) may take, its compilation included, before its replica counts as hanging and is started again",
            gt=0,
        ),
    ] = 600.0
    grace_s: Annotated[float, _replicas("Seconds that running requests get to finish after SIGTERM", ge=0)] = 30.0
    until_stdin_closes: Annotated[
        bool, _replicas("Stop, as after SIGTERM, when standard input ends: for a program that starts a server")
    ] = False
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _log("The least important lines to log")] = (
        "info"
    )
    log_format: Annotated[Literal["text", "json"], _log("Log lines for people, or one JSON object a line")] = "text"


MOST_PIXELS = 16_777_216
"""The limit of pixels for an output of a model of unknown size, and for a request's images together."""

_TIMES_THE_DEFAULT = 16


def most_pixels(config: Config, width: int | None, height: int | None) -> int:
    """The limit of pixels for one output of a model whose default size is ``width`` x ``height``."""
    if config.max_pixels:
        return config.max_pixels
    return _TIMES_THE_DEFAULT * width * height if width and height else MOST_PIXELS
