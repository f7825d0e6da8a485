"""The request for rollouts, like those of :mod:`.calls`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ..formats.tensor_files import write_header
from ..protocol.rollouts import TENSOR, FloatName, SamplerName
from . import calls
from .calls import Call
from .host_tensors import from_torch
from .rollouts import Rollout, decode_rollouts

if TYPE_CHECKING:
    import torch


def rollout(
    prompt: str | Sequence[str], *, sampler: SamplerName = "sde", noise_level: float = 0.7, no_const: bool = False,
    trajectory: bool = True, environment: bool = False, debug: bool = False,
    sde_steps: Sequence[int] | None = None, return_steps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None, initial_noise: torch.Tensor | None = None,
    generator_device: Literal["cpu", "cuda"] | None = None, denoise_seeds: Sequence[str] | None = None,
    output_dtype: FloatName | Literal["uint8"] | None = None, flow_shift: float | None = None,
    recorded: bool = True, shared_memory: bool = False, **arguments: Any,
) -> Call[list[Rollout]]:  # fmt: skip
    """Generate with log-probabilities: a :class:`Rollout` for each sample, prompt by prompt.

    ``sampler`` is ``sde``, ``dance``, ``cps`` or ``ode``; ``trajectory``, ``environment`` and ``debug`` select the
    records in the reply. ``return_steps`` are indices of latents, from 0 (before the first step) to T (after the last):
    the log-probability of step k needs k and k + 1. ``denoise_seeds`` has a seed for each sample. Without ``recorded``,
    the reply has only the outputs of a plain generation. ``arguments`` are those of :meth:`generate`.
    """
    call = calls.generate(prompt, **arguments)
    fields = {
        "rollout": recorded,
        "rollout_sde_type": sampler,
        "rollout_noise_level": noise_level,
        "rollout_log_prob_no_const": no_const,
        "rollout_return_dit_trajectory": trajectory,
        "rollout_return_denoising_env": environment,
        "rollout_debug_mode": debug,
        "rollout_sde_step_indices": None if sde_steps is None else list(sde_steps),
        "rollout_return_step_indices": None if return_steps is None else list(return_steps),
        "rollout_shared_memory": shared_memory,
        "rollout_video_dtype": output_dtype,
        "generator_device": generator_device,
        "denoise_seeds": None if denoise_seeds is None else list(denoise_seeds),
        "flow_shift": flow_shift,
        "sigmas": None if sigmas is None else list(sigmas),
        "initial_noise": None if initial_noise is None else _encoded(initial_noise),
    }
    read = partial(decode_rollouts, shared=shared_memory)
    return Call("POST", "/rollout/generate", read, {**(call.body or {}), **calls.given(fields)}, call.timeout_s)


def _encoded(tensor: torch.Tensor) -> dict[str, Any]:
    held = from_torch("initial_noise", tensor.float())
    data = write_header([("t", held.dtype, held.shape)]) + bytes(held.data)
    return {TENSOR: True, "data": base64.b64encode(data).decode("ascii")}
