"""The options of forwards: how calls share them, and what makes them fast or small."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import msgspec

from . import option
from .step_caching import PATTERN, CacheRule

OffloadKind = Literal["off", "component", "block"]


class ForwardOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of the configuration that the workers' forwards obey."""

    fuse_projections: Annotated[
        bool, option.forwards("Compute layers with one input (queries, keys, values; gate and up) as one product")
    ] = False
    batching: Annotated[
        Literal["auto", "merged", "interleaved", "serial"],
        option.forwards("How requests share forwards; auto lets the self-test at load decide"),
    ] = "auto"
    attention_backend: Annotated[
        str,
        option.forwards(
            "The attention of diffusers' models, by diffusers' names (native, flash, _flash_3, sage, xformers, …); "
            "auto takes the fastest exact one that runs on the device; deterministic requests have plain diffusers' own"
        ),
    ] = "auto"
    compile: Annotated[
        Literal["off", "on"],
        option.forwards(
            "Compile the denoiser's repeated blocks with torch.compile, in the background while the plain ones serve; "
            "kept in `safelight/inductor` below `$XDG_CACHE_HOME`, or `~/.cache`"
        ),
    ] = "off"
    compile_text_encoders: Annotated[
        bool, option.forwards("With --compile on, compile the repeated blocks of text encoders, too")
    ] = False
    compile_sizes: Annotated[
        str,
        option.forwards(
            "Sizes, separated by commas, that are compiled before the server is ready: width, height, and how many "
            "outputs share a forward, as `1024x1024,512x512x4`"
        ),
    ] = ""
    quantize: Annotated[
        str,
        option.forwards(
            "Hold the weights of repeated blocks in 8 bits: int8, fp8 or fp8-dynamic for the denoiser, or "
            "`component=scheme`, separated by commas; the start fails where that is not accurate enough"
        ),
    ] = ""
    offload: Annotated[
        OffloadKind,
        option.forwards(
            "Keep weights in page-locked host memory, and bring them to the GPU for their forwards: one component at a "
            "time, or also its repeated blocks one by one"
        ),
    ] = "off"
    max_batch: Annotated[int, option.forwards("Outputs whose calls may share one forward", ge=1, le=4096)] = 16
    max_batch_tokens: Annotated[
        int,
        option.forwards(
            "Positions (tokens or latent pixels) that may share one forward; 0 leaves that to --merge-gain and memory",
            ge=0,
        ),
    ] = 0
    merge_gain: Annotated[
        float,
        option.forwards(
            "Let twice as many outputs share a forward if that makes each call faster by this share, as measured while "
            "serving; 0 merges as many as --max-batch allows",
            ge=0,
            lt=1,
        ),
    ] = 0.1
    gather_s: Annotated[
        float,
        option.forwards(
            "Seconds that new requests wait at most for the clients that were just answered, if nothing else runs, so "
            "that all of them start together; 0 starts at once",
            ge=0,
            le=1,
        ),
    ] = 0.5
    prompt_cache_mb: Annotated[
        int, option.forwards("Megabytes of prompt embeddings that each replica keeps; 0 keeps none", ge=0)
    ] = 256
    vae_tiling: Annotated[
        Literal["auto", "on", "off"],
        option.forwards(
            "Let autoencoders compute large pictures and clips in overlapping tiles: on, off, or when one has run "
            "out of memory alone; deterministic requests are never tiled"
        ),
    ] = "auto"
    vae_slicing: Annotated[
        bool, option.forwards("Let autoencoders compute the rows of a shared forward one after the other")
    ] = False
    guidance_pairing: Annotated[
        Literal["on", "off"],
        option.forwards(
            "Make the two calls of guidance as one forward, where a pipeline calls its denoiser twice a step"
        ),
    ] = "on"
    piecewise_cuda_graph: Annotated[
        Literal["auto", "on", "off"],
        option.forwards(
            "Replay the repeated blocks of denoisers and text encoders as CUDA graphs; auto does so on a CUDA device, "
            "and on is refused without one"
        ),
    ] = "auto"
    cuda_graph_sizes: Annotated[
        str,
        option.forwards(
            "Sizes, separated by commas, whose CUDA graphs are captured before the server is ready: width, height, how "
            "many outputs share a forward, and after a colon a clip's frames, as `1024x1024,512x512x4,832x480:33`; "
            "others are captured when they come again"
        ),
    ] = ""
    enforce_piecewise_cuda_graph: Annotated[
        bool,
        option.forwards(
            "Fail the start if a block has no CUDA graph for a size of the warm-up (the model's own size if none is "
            "listed), and a request with a call for which none was captured"
        ),
    ] = False
    cuda_graph_mb: Annotated[
        int, option.forwards("Megabytes that CUDA graphs may take on each GPU; the shapes used least recently go", ge=1)
    ] = 4096
    step_cache: Annotated[
        str,
        option.forwards(
            "Answer steps that hardly change anything with the last step's forward, for requests that do not say: off, "
            "balanced, fast, or a threshold from 0 to 1",
            pattern=PATTERN,
        ),
    ] = "off"
    step_cache_rule: Annotated[
        CacheRule, option.forwards("How the step cache estimates what a step would change, by the name of its paper")
    ] = "easycache"

    @property
    def max_positions(self) -> int:
        """``max_batch_tokens``, where 0 sets no limit."""
        return self.max_batch_tokens or sys.maxsize
