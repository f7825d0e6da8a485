"""Rollouts: what a trainer asks to have recorded of a generation, and what was."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

from .codec import Buffer

SamplerName = Literal["sde", "dance", "cps", "ode"]

FloatName = Literal["float32", "float16", "bfloat16"]
"""The dtypes of an output, beside uint8."""


class Tensor(msgspec.Struct, frozen=True):
    """A tensor's bytes, row by row, little-endian; ``dtype`` as torch names it ("torch.float32")."""

    dtype: str
    shape: list[int]
    data: Buffer


class StepNoise(msgspec.Struct, frozen=True):
    """``keys`` has one for each sample; ``seed`` is the request's, and ``None`` where each sample has its own."""

    keys: list[str]
    seed: int | None

    def seed_of(self, sample: int, sample_seed: int, step: int) -> int:
        """The seed of one step's noise, as UniRL derives it (``make_denoise_step_generators`` of ``unirl/sde/noise.py``
        in Tencent-Hunyuan/UniRL), so that a trainer can draw the same."""
        base = sample_seed if self.seed is None else self.seed
        text = f"{base}::step::{step}::sample::{self.keys[sample]}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % (2**63 - 1)


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """How a request is sampled, and which records its reply has.

    Without ``recorded`` it is a plain generation, whose reply has only the output. ``sde_steps`` are the steps with
    noise (``None``: all); ``places`` are the indices of the states in the reply, from 0 before the first step.
    ``flow_shift`` replaces the scheduler's. ``initial_noise`` has a tensor for each sample, or one for all.
    ``step_noise`` replaces the sample's generator as the source of the steps' noise.
    """

    recorded: bool = True

    sampler: SamplerName = "sde"
    noise_level: float = 0.7
    no_const: bool = False
    returns_debug: bool = False
    returns_environment: bool = False
    returns_trajectory: bool = False
    sde_steps: list[int] | None = None
    places: list[int] | None = None
    sigmas: list[float] | None = None
    flow_shift: float | None = None
    initial_noise: list[Tensor] = []
    step_noise: StepNoise | None = None
    output_dtype: FloatName | Literal["uint8"] = "float32"
    generator_device: Literal["cpu", "cuda"] = "cpu"
    shared_memory: bool = False


class RolledOut(msgspec.Struct, frozen=True, kw_only=True):
    """The records of a sample.

    ``reply`` is its part of the reply, where a map ``{TENSOR: i}`` stands for ``tensors[i]`` or, with a ``file``, for
    the tensor named ``i`` in that safetensors file.
    """

    reply: dict[str, Any]
    tensors: list[Tensor]
    file: str | None = None


TENSOR = "__tensor__"
