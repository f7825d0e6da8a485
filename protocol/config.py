"""Every option of a server, typed and documented.

The launcher reads them (``process.configuration``) and sends the result to its child processes as one line of JSON on
their standard input.
"""

from __future__ import annotations

from typing import Annotated, Literal

from . import option
from .forward_options import ForwardOptions


class Config(ForwardOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of one server. ``docs/configuration.md`` is generated from this class."""

    model: Annotated[
        str,
        option.model(
            "A directory with a diffusers pipeline, a checkpoint in one file (.safetensors, .gguf), a hub "
            "id, `shapes` or `shapes-video`"
        ),
    ] = "shapes"
    base_pipeline: Annotated[
        str | None,
        option.model(
            "The pipeline, a directory or a hub id, that a checkpoint in one file belongs to: it gives the "
            "layout and what is not in the file; when not given, diffusers guesses it"
        ),
    ] = None
    variant: Annotated[
        str | None, option.model("Load the weights of this variant, such as fp16, in components that have files of it")
    ] = None
    revision: Annotated[
        str | None, option.model("The branch, tag or commit of the hub's repository; main when not given")
    ] = None
    served_model_name: Annotated[
        str | None, option.model("The name that clients see; the last part of `model` when not given")
    ] = None
    host: Annotated[str, option.http("The address to listen on")] = "127.0.0.1"
    port: Annotated[int, option.http("The port to listen on; 0 takes a free one", ge=0, le=65535)] = 30000
    api_key: Annotated[
        str | None,
        option.http(
            "When given, every route but the health checks asks for it as a bearer token; every local user "
            "can read a flag in the process list, so better use the variable or `--api-key-file`"
        ),
    ] = None
    api_key_file: Annotated[str | None, option.http("A file that holds the API key, and nothing else")] = None
    insecure: Annotated[
        bool, option.http("Listen on addresses that other machines reach although there is no API key")
    ] = False
    admin: Annotated[
        bool, option.http("Have the routes that change the server: weights, adapters, sleep, pause, abort")
    ] = True
    allowed_hosts: Annotated[
        str,
        option.http(
            "Host names, separated by commas, that clients may use besides loopback names and the "
            "address it listens on; `*` allows every name"
        ),
    ] = ""
    cors_origins: Annotated[
        str, option.http("Origins, separated by commas, whose web pages may call this server, as `https://example.com`")
    ] = ""
    device: Annotated[
        Literal["auto", "cpu", "cuda"], option.model("Where the model runs; auto takes CUDA when there is one")
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        option.model(
            "The weights' dtype; auto is bfloat16 on a GPU that has it, else float16 there; on a CPU that multiplies "
            "bfloat16 it is that if the checkpoint is stored so, else float32"
        ),
    ] = "auto"
    tp: Annotated[
        int, option.replicas("Tensor-parallel ranks of each replica: processes that share the model", ge=1, le=64)
    ] = 1
    ulysses: Annotated[
        int,
        option.replicas(
            "Sequence-parallel ranks of each replica, which share a denoiser's tokens; each has the weights of --tp, "
            "so that a replica has the product of both",
            ge=1,
            le=64,
        ),
    ] = 1
    cfg_parallel: Annotated[
        bool,
        option.replicas(
            "Have two groups of ranks, each of --tp times --ulysses, compute half of the rows of each denoising "
            "forward: those of guidance, and those of several requests"
        ),
    ] = False
    replicas: Annotated[int, option.replicas("Copies of the model, each in a process of its own", ge=1, le=64)] = 1
    nursery: Annotated[
        bool,
        option.replicas(
            "Fork workers from one process that has imported torch and diffusers, so that they start in a "
            "fraction of the time; only on Linux"
        ),
    ] = True
    self_test_cache: Annotated[
        bool,
        option.replicas(
            "Take over what the self-test of an earlier start has found out about the same files, with the "
            "same software and hardware; kept in `safelight/self-tests` below `$XDG_CACHE_HOME`, or `~/.cache`"
        ),
    ] = True
    threads: Annotated[
        int, option.replicas("CPU threads of each replica; 0 divides the cores among them", ge=0, le=1024)
    ] = 0
    max_running: Annotated[
        int, option.queue("Outputs in progress at once in one replica; later ones wait in the queue", ge=1, le=4096)
    ] = 32
    max_queue: Annotated[
        int, option.queue("Requests that may wait; one more is answered with 429 and Retry-After", ge=1)
    ] = 256
    max_queue_mb: Annotated[
        int,
        option.queue(
            "Megabytes that waiting requests may hold, and as many again waiting operations; what would "
            "make them more gets a 429",
            ge=1,
        ),
    ] = 1024
    max_unread_mb: Annotated[
        int,
        option.queue(
            "Megabytes of replies, and of rollouts in shared memory, that clients have not taken yet; "
            "while there are more, old files go, and then generations get a 429",
            ge=1,
        ),
    ] = 4096
    max_operations: Annotated[
        int,
        option.queue(
            "Operations (updates, digests, changes of adapters) that may wait; one more is answered with "
            "429 and Retry-After",
            ge=1,
        ),
    ] = 64
    max_outputs: Annotated[int, option.asking("Outputs that one request may ask for", ge=1, le=4096)] = 64
    max_steps: Annotated[int, option.asking("Denoising steps that one request may ask for", ge=1)] = 1000
    max_pixels: Annotated[
        int,
        option.asking(
            "Width times height that one output may have; 0: 16 times what the model makes by itself, and "
            "16777216 where that is not known",
            ge=0,
        ),
    ] = 0
    max_forward_s: Annotated[
        float,
        option.queue(
            "Seconds that one forward of a request larger than the model's own size may take, estimated "
            "from measured ones; larger requests would hold up all others, and get a 400",
            gt=0,
        ),
    ] = 60.0
    max_frames: Annotated[int, option.asking("Frames that one video may have", ge=1)] = 1024
    max_prompt_chars: Annotated[int, option.asking("Characters that one prompt may have", ge=1)] = 10_000
    max_connections: Annotated[
        int, option.http("Connections that clients may have open; beyond it, one that waits for its client ends", ge=1)
    ] = 4096
    max_body_mb: Annotated[int, option.http("Megabytes that a request's body may have", ge=1)] = 64
    max_bodies_mb: Annotated[
        int, option.http("Megabytes that the bodies being received may take together; beyond it, a 429", ge=1)
    ] = 1024
    body_timeout_s: Annotated[
        float, option.http("Seconds in which a request's body has to arrive, and one more for each megabyte", gt=0)
    ] = 60.0
    max_update_mb: Annotated[int, option.weights("Megabytes that the body of a weight update may have", ge=1)] = 65536
    max_update_hold_s: Annotated[
        float,
        option.weights(
            "Seconds that a begun update, or one that a trainer broadcasts, may hold back generation; then "
            "the server aborts it",
            gt=0,
        ),
    ] = 1800.0
    pickle_payloads: Annotated[
        bool,
        option.weights("Read `serialized_named_tensors`, streams that trainers pickle; read by an exact allow-list"),
    ] = True
    weights_roots: Annotated[
        str,
        option.weights(
            "Directories, separated as in PATH, from which weights, and images by their "
            "path, may be read; when not given, the current one and the one that the model lies in"
        ),
    ] = ""
    undo_mb: Annotated[
        int,
        option.weights(
            "Megabytes of host memory that each rank may use for what an update overwrites, until it is "
            "committed, page-locked with a GPU; 0: half of the machine's memory, divided among all ranks",
            ge=0,
        ),
    ] = 0
    stage_on_gpu: Annotated[
        bool,
        option.weights(
            "Stage the new bytes of an update in free memory of the GPU, half of it at most, and keep the old "
            "ones there until the commit; what has no room there passes through host memory"
        ),
    ] = True
    undo_spill: Annotated[
        str | None, option.weights("A directory whose disk takes what does not fit into `--undo-mb`")
    ] = None
    weights_journal: Annotated[
        str | None,
        option.weights(
            "A directory that keeps what updates committed, for restarts; without it, weights that were "
            "updated live only as long as a replica that has them"
        ),
    ] = None
    allow_model_source: Annotated[
        bool, option.weights("Let an update from disk name a hub id, which is downloaded")
    ] = False
    lora: Annotated[
        str,
        option.adapters("Adapters to start with, as `name=path`, separated by commas; each is a file or a directory"),
    ] = ""
    lora_mode: Annotated[
        Literal["auto", "merge", "dynamic", "request"],
        option.adapters("How the adapters of `--lora` are applied; `request` loads them for requests that name them"),
    ] = "auto"
    max_loras: Annotated[
        int, option.adapters("Adapters that may be loaded; one more evicts the least recently used", ge=0)
    ] = 64
    max_lora_mb: Annotated[int, option.adapters("Megabytes of all loaded and gathered adapters", ge=1)] = 8192
    max_merged_mb: Annotated[
        int,
        option.adapters(
            "Megabytes of host memory on each rank for the weights that adapters are merged into, which are kept "
            "without them; 0: half of the machine's memory, divided among all ranks",
            ge=0,
        ),
    ] = 0
    request_timeout_s: Annotated[
        float, option.queue("Seconds after which a request without a `timeout_s` of its own gets a 504", gt=0)
    ] = 600.0
    start_timeout_s: Annotated[
        float, option.replicas("Seconds that a replica may take to load before the start counts as failed", gt=0)
    ] = 1800.0
    stall_timeout_s: Annotated[
        float,
        option.replicas(
            "Seconds without a heartbeat, or without progress between two forwards, after which a ready "
            "replica is started again; a scheduler that is silent for as long, and for ten seconds at least, "
            "ends the server",
            gt=0,
        ),
    ] = 120.0
    forward_timeout_s: Annotated[
        float,
        option.replicas(
            "Seconds that one forward (a component's call: a denoising step, a VAE's decode of a whole "
            "clip) may take, its compilation included, before its replica counts as hanging and is started again",
            gt=0,
        ),
    ] = 600.0
    grace_s: Annotated[float, option.replicas("Seconds that running requests get to finish after SIGTERM", ge=0)] = 30.0
    until_stdin_closes: Annotated[
        bool, option.replicas("Stop, as after SIGTERM, when standard input ends: for a program that starts a server")
    ] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], option.log("The least important lines to log")
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        option.log("Log lines for people, or one JSON object a line"),
    ] = "text"

    @property
    def replica_ranks(self) -> int:
        """Ranks of each replica, a process each."""
        return self.tp * self.ulysses * (2 if self.cfg_parallel else 1)

    @property
    def world_size(self) -> int:
        """Ranks of all replicas."""
        return self.replicas * self.replica_ranks


MOST_PIXELS = 16_777_216
"""The limit of pixels for an output of a model of unknown size, and for a request's images together."""

_TIMES_THE_DEFAULT = 16


def most_pixels(config: Config, width: int | None, height: int | None) -> int:
    """The limit of pixels for one output of a model whose default size is ``width`` x ``height``."""
    if config.max_pixels:
        return config.max_pixels
    return _TIMES_THE_DEFAULT * width * height if width and height else MOST_PIXELS
