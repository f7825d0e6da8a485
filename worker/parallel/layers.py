"""Layers that hold one rank's part of a weight and give every rank the whole result."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .ranks import Ranks


class RowParallelLinear(nn.Linear):
    """``weight`` [out, in / ranks]: the products with the ranks' parts of the input are added up.

    The first rank's product has the bias: in low precision each sum rounds, and so there is one fewer.
    """

    ranks: Ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.ranks.sum(functional.linear(input, self.weight, self.bias if self.ranks.rank == 0 else None))


class GatheredColumnLinear(nn.Linear):
    """``weight`` [out / ranks, in]: each rank makes its part of the output features, and every rank gets them all."""

    ranks: Ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.ranks.gather(functional.linear(input, self.weight, self.bias)), dim=-1)


class VocabularyParallelEmbedding(nn.Embedding):
    """``weight`` [rows / ranks, width]: each rank looks up the ids that it has, and all are added up."""

    ranks: Ranks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = self.weight.shape[0]
        local = input - self.ranks.rank * rows
        elsewhere = (local < 0) | (local >= rows)
        found = functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.ranks.sum(found.masked_fill(elsewhere[..., None], 0))


class AcrossHeadsRMSNorm(nn.RMSNorm):
    """``weight`` [width / ranks]: an RMS norm over the features of all ranks, of which the input holds this rank's."""

    ranks: Ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = self.ranks.sum(wide.square().sum(dim=-1, keepdim=True))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        normed = wide * torch.rsqrt(squares / (x.shape[-1] * self.ranks.size) + eps)
        return (normed if self.weight is None else normed * self.weight.float()).to(x.dtype)
