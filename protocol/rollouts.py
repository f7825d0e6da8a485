"""Rollouts: what a trainer asks to have recorded of a generation, and what was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from .codec import Buffer
from .fields import Field, table_of

SamplerName = Literal["sde", "dance", "cps", "ode"]
"""The samplers of ``rollout/transitions.py``."""

MAX_NOISE: Mapping[SamplerName, float] = {"sde": 100.0, "dance": 100.0, "cps": 1.0, "ode": 100.0}
"""The largest η of each sampler."""

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


def _of(help: str, wire: str, *, short: str | None = None) -> Field:
    return Field(help, wire=f"rollout_{wire}", short=short)


_PLAIN = Field("False for a plain generation in the same reply format, without noise", wire="rollout")
_DEBUG = _of("Return noises, means, model outputs and standard deviations", "debug_mode", short="debug")
_ENVIRONMENT = _of("Return the denoiser's inputs", "return_denoising_env", short="environment")
_TRAJECTORY = _of("Return latents, timesteps and sigmas", "return_dit_trajectory", short="trajectory")
_INDICES = "Indices of the latents to return: 0 before the first step, T after the last"
_STEP_INDICES = _of(_INDICES, "return_step_indices", short="return_steps")
_DTYPE = _of("The dtype of generated_output; uint8 has [0, 255] for [0, 1]", "video_dtype")


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """How a request is sampled, and which records its reply has.

    ``initial_noise`` has a tensor for each sample, or one for all. ``step_noise`` replaces the sample's generator as
    the source of the steps' noise.
    """

    recorded: Annotated[bool, _PLAIN] = True
    sampler: Annotated[SamplerName, _of("The sampler that makes steps stochastic, or ode for none", "sde_type")] = "sde"
    noise_level: Annotated[float, _of("η: from 0, with cps to 1", "noise_level")] = 0.7
    no_const: Annotated[bool, _of("Give −(x′ − mean)² in place of log-probabilities", "log_prob_no_const")] = False
    returns_debug: Annotated[bool, _DEBUG] = False
    returns_environment: Annotated[bool, _ENVIRONMENT] = False
    returns_trajectory: Annotated[bool, _TRAJECTORY] = False
    sde_steps: Annotated[list[int] | None, _of("The steps that have noise; all by default", "sde_step_indices")] = None
    step_indices: Annotated[list[int] | None, _STEP_INDICES] = None
    sigmas: Annotated[list[float] | None, Field("The schedule, exactly, in fp32; 0 may be left out at its end")] = None
    flow_shift: Annotated[float | None, Field("Replaces the schedule's shift", 1e-6, 1000)] = None
    output_dtype: Annotated[FloatName | Literal["uint8"], _DTYPE] = "float32"
    generator_device: Annotated[Literal["cpu", "cuda"], Field("Where noise is drawn")] = "cpu"
    shared_memory: Annotated[bool, _of("Tensors as files, for a client on the same machine", "shared_memory")] = False
    initial_noise: list[Tensor] = []
    step_noise: StepNoise | None = None


ROLLOUT = table_of(Rollout)


class RolledOut(msgspec.Struct, frozen=True, kw_only=True):
    """The records of a sample.

    ``reply`` is its part of the reply, where a map ``{TENSOR: i}`` stands for ``tensors[i]`` or, with a ``file``, for
    the tensor named ``i`` in that safetensors file.
    """

    reply: dict[str, Any]
    tensors: list[Tensor]
    file: str | None = None


TENSOR = "__tensor__"
