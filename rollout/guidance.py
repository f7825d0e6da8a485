"""How pipelines make one velocity of what a denoiser says with the prompt and without it."""

from __future__ import annotations

from typing import Literal

import torch

Rule = Literal["none", "from_negative", "from_positive", "normed"]
"""``none``: there is one answer. ``from_negative``: negative + scale · (positive − negative), as in most pipelines.
``from_positive``: positive + scale · (positive − negative), as in Z-Image's. ``normed``: ``from_negative`` with the
norm of the positive answer over the last dimension, as in Qwen-Image's."""

GUIDED: tuple[Rule, ...] = ("from_negative", "from_positive", "normed")


def guided(
    rule: Rule, positive: torch.Tensor, negative: torch.Tensor | None, scale: float, *, widened: bool = False
) -> torch.Tensor:
    """The answers put together, by the operations of diffusers' pipelines in their order; in fp32 if ``widened``."""
    if negative is None:
        return positive
    if widened:
        positive, negative = positive.float(), negative.float()
    if rule == "from_positive":
        return positive + scale * (positive - negative)
    combined = negative + scale * (positive - negative)
    if rule == "normed":
        norm: torch.Tensor = torch.norm(positive, dim=-1, keepdim=True)
        combined = combined * (norm / torch.norm(combined, dim=-1, keepdim=True))
    return combined
