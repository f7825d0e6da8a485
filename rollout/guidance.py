"""Classifier-free guidance: rules that combine a denoiser's two predictions into one velocity."""

from __future__ import annotations

from typing import Literal

import torch

Rule = Literal["none", "from_negative", "from_positive", "normed"]
"""``none``: a single prediction. ``from_negative``: negative + scale · (positive − negative), as in most pipelines.
``from_positive``: positive + scale · (positive − negative), as in Z-Image's. ``normed``: ``from_negative``, rescaled to
the norm of the positive prediction over the last dimension, as in Qwen-Image's."""

GUIDED: tuple[Rule, ...] = ("from_negative", "from_positive", "normed")


def guided(
    rule: Rule, positive: torch.Tensor, negative: torch.Tensor | None, scale: float, *, widened: bool = False
) -> torch.Tensor:
    """Combine the predictions, with the operations of diffusers' pipelines in their order; in fp32 if ``widened``."""
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
