"""The options of forwards: how calls share them, and what makes them fast or small."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from . import option


class ForwardOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of the configuration that the workers' forwards obey."""

    fuse_projections: Annotated[
        bool, option.forwards("Compute layers with one input (queries, keys, values; gate and up) as one product")
    ] = False
    batching: Annotated[
        Literal["auto", "merged", "interleaved", "serial"],
        option.forwards("How requests share forwards; auto lets the self-test at load decide"),
    ] = "auto"
    max_batch: Annotated[int, option.forwards("Calls that may share one forward", ge=1, le=4096)] = 16
    max_batch_tokens: Annotated[
        int, option.forwards("Positions (tokens or latent pixels) that may share one forward", ge=1)
    ] = 65536
    prompt_cache_mb: Annotated[
        int, option.forwards("Megabytes of prompt embeddings that each replica keeps; 0 keeps none", ge=0)
    ] = 256
