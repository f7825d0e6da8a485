"""Layers that hold one rank's shard of a weight and return the whole result on every rank."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .ranks import Ranks


class RowParallelLinear(nn.Linear):
    """``weight`` [out, in / ranks]: each rank multiplies its part of the input, and an all-reduce adds up the products.

    Rank 0 adds the bias before the all-reduce, which saves one rounding in low precision.
    """

    ranks: Ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.ranks.all_reduce(functional.linear(input, self.weight, self.bias if self.ranks.rank == 0 else None))


class GatheredColumnLinear(nn.Linear):
    """``weight`` [out / ranks, in]: each rank computes its output features, and an all-gather joins them."""

    ranks: Ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.ranks.all_gather(functional.linear(input, self.weight, self.bias)), dim=-1)


class VocabularyParallelEmbedding(nn.Embedding):
    """``weight`` [rows / ranks, width]: each rank looks up its own ids, and an all-reduce adds up the rows."""

    ranks: Ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = self.weight.shape[0]
        local = input - self.ranks.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.ranks.all_reduce(found.masked_fill(elsewhere[..., None], 0))


class AcrossHeadsRMSNorm(nn.RMSNorm):
    """``weight`` [width / ranks]: RMS norm over the features of all ranks; the input has this rank's features."""

    ranks: Ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = self.ranks.all_reduce(wide.square().sum(dim=-1, keepdim=True))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        normed = wide * torch.rsqrt(squares / (x.shape[-1] * self.ranks.size) + eps)
        return (normed if self.weight is None else normed * self.weight.float()).to(x.dtype)
