"""A trainer's tensors, and what a server's checksum of them is."""

from __future__ import annotations

import torch

from safelight.formats.digests import module_digest
from safelight.worker.weights.snapshot.digests import raw_bytes

Tensors = dict[str, torch.Tensor]

SEVERAL = 100_000
"""Bytes of a bucket that holds a part of the tiny transformer's 1.1 MB."""


def plus(tensors: Tensors, number: float) -> Tensors:
    return {name: tensor + number for name, tensor in tensors.items()}


def digest(tensors: Tensors) -> str:
    return module_digest((name, raw_bytes(tensors[name])) for name in sorted(tensors))
