"""Rollouts: what a trainer asks to have recorded of a generation, and what was."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .codec import Buffer

SamplerName = Literal["sde", "cps", "ode"]


class Tensor(msgspec.Struct, frozen=True):
    """A tensor's bytes, row by row, little-endian; ``dtype`` as torch names it ("torch.float32")."""

    dtype: str
    shape: list[int]
    data: Buffer


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """How a request is sampled, and what is to be told of it.

    ``sde_steps`` are the steps that have noise, all where it is ``None``; of ``return_steps`` debug tensors and latents
    are told. ``initial_noise`` is for the sample of the same place, or one for all.
    """

    sampler: SamplerName = "sde"
    noise_level: float = 0.7
    no_const: bool = False
    returns_debug: bool = False
    returns_environment: bool = False
    returns_trajectory: bool = False
    sde_steps: list[int] | None = None
    return_steps: list[int] | None = None
    sigmas: list[float] | None = None
    initial_noise: list[Tensor] = []
    generator_device: Literal["cpu", "cuda"] = "cpu"
    shared_memory: bool = False


class RolledOut(msgspec.Struct, frozen=True, kw_only=True):
    """What was recorded of a sample.

    ``told`` is its part of the reply, where a map ``{TENSOR: i}`` stands for ``tensors[i]``; or, with a ``file``, for
    the tensor of that number's name in that safetensors file.
    """

    told: dict[str, Any]
    tensors: list[Tensor]
    file: str | None = None


TENSOR = "__tensor__"
