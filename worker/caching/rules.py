"""Rules of step caches: estimates of how far the denoiser's answer has moved since the last step.

Both add up their estimates over the steps, and compute an answer anew when the sum reaches a threshold. Here they see
the denoiser from outside, as a pipeline does: the latents that enter it, and its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ...protocol.step_caching import CacheRule


class Rule(Protocol):
    """The estimate for one sample. Its tensors stay on the device."""

    def distance(self, latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The estimated relative change of the answer since the last step; ``None`` if nothing is known yet.

        Called in each step, with latents of the same shapes.
        """

    def computed(self, latents: Sequence[torch.Tensor], answer: Sequence[torch.Tensor]) -> None:
        """Note that the denoiser answered ``latents`` with ``answer``."""


class EasyCache:
    """The answer changes in proportion to the latents, at the rate of the last two answers that were computed.

    Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching"
    (arXiv 2507.02860), and its published code for Wan 2.1 (github.com/H-EmbodVis/EasyCache).
    """

    def __init__(self) -> None:
        self._last: list[torch.Tensor] = []
        self._latents: list[torch.Tensor] = []
        self._answer: list[torch.Tensor] = []
        self._size: torch.Tensor | None = None
        self._rate: torch.Tensor | None = None

    def distance(self, latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        last, self._last = self._last, _copied(latents)
        if self._rate is None or self._size is None:
            return None
        return self._rate * _mean_change(latents, last) / self._size

    def computed(self, latents: Sequence[torch.Tensor], answer: Sequence[torch.Tensor]) -> None:
        if self._answer:
            self._rate = _mean_change(answer, self._answer) / _mean_change(latents, self._latents)
        self._latents, self._answer = _copied(latents), _copied(answer)
        self._size = _mean(answer)


class TeaCache:
    """The answer changes as much as the denoiser's input does.

    Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (arXiv 2411.19108;
    github.com/ali-vilab/TeaCache). There the input is that of the first block, modulated by the timestep, and a
    polynomial that was fitted to the model scales its change. Here it is the latents, unscaled.
    """

    def __init__(self) -> None:
        self._last: list[torch.Tensor] = []

    def distance(self, latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        found = _mean_change(latents, self._last) / _mean(self._last) if self._last else None
        self._last = _copied(latents)
        return found

    def computed(self, latents: Sequence[torch.Tensor], answer: Sequence[torch.Tensor]) -> None:
        return


def new_rule(name: CacheRule) -> Rule:
    return EasyCache() if name == "easycache" else TeaCache()


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean absolute value, in fp32."""
    return torch.cat([tensor.float().abs().flatten() for tensor in tensors]).mean()


def _mean_change(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    return _mean([tensor.float() - other.float() for tensor, other in zip(tensors, others, strict=True)])


def _copied(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]
