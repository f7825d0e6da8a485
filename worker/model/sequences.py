"""Sequence parallelism of a pipeline: which of its components share their tokens among ranks."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from ..parallel.ranks import Ranks
from ..parallel.sequence import CannotSplit, check_split, split_sequence
from ..pipelines.components import DENOISERS
from ..weights.checkpoint.loader import CannotLoad
from .modules import modules


def split_denoisers(pipeline: DiffusionPipeline, tp: int, ranks: Ranks) -> list[str]:
    """Divide the tokens of every denoiser among ``ranks``, each with the weights of one of ``tp``; returns their names.

    Raises ``CannotLoad``, before anything is divided.
    """
    if ranks.size == 1:
        return []
    found = {name: module for name, module in modules(pipeline).items() if name in DENOISERS}
    if not found:
        raise CannotLoad(
            f"{type(pipeline).__name__} has no denoiser whose tokens ranks can share; serve it with --ulysses 1"
        )
    for name, module in found.items():
        try:
            check_split(module, tp, ranks.size)
        except CannotSplit as reason:
            raise CannotLoad(f"the {name} cannot share its tokens: {reason}") from reason
    for module in found.values():
        split_sequence(module, ranks)
    return list(found)
