"""A step cache that adds the change of the latents to the last answer, as EasyCache's published code does."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from safelight.protocol.generation import Generate
from safelight.worker.caching.caching import Caching
from safelight.worker.caching.latents import latents
from safelight.worker.caching.savings import Savings
from safelight.worker.caching.step_cache import CacheCounts, StepCache
from safelight.worker.crossing.call import Call
from safelight.worker.crossing.chain import Proceed


class ResidualCache(StepCache):
    """For denoisers that are called once a step, and answer one tensor of their latents' shape."""

    _computed_for: torch.Tensor

    def __call__(self, call: Call, proceed: Proceed) -> Any:
        (own,), skipped = latents(call), self.skipped
        answer = super().__call__(call, proceed)
        if self.skipped == skipped:
            self._computed_for = own.clone()
            return answer
        return pytree.tree_map_only(torch.Tensor, lambda one: one + (own - self._computed_for), answer)


class ResidualCaching(Caching):
    """Gives each request such a cache, with a threshold of EasyCache's."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def savings(self, request: Generate, *, merges: bool) -> Savings:
        return Savings(ResidualCache(self._threshold, "easycache", CacheCounts()))
