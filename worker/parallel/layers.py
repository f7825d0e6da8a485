"""Layers that hold one rank's part of a weight and give every rank the whole result."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .ranks import Ranks


class RowParallelLinear(nn.Linear):
    """``weight`` [out, in / ranks]: the products with a rank's part of the input are added up, then the bias.

    ``input_is_whole``: each rank is given all input features, and takes its own.
    """

    ranks: Ranks
    input_is_whole: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.input_is_whole:
            width = self.weight.shape[1]
            input = input[..., self.ranks.rank * width : (self.ranks.rank + 1) * width]
        product = self.ranks.sum(functional.linear(input, self.weight))
        return product if self.bias is None else product + self.bias


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
