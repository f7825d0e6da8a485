"""The request for rollouts, like those of :mod:`.calls`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ..formats.tensor_files import write_header
from ..protocol.rollouts import ROLLOUT, TENSOR, FloatName, SamplerName
from .calls import Call, by_table, generate, given
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
    fields = {
        **by_table(locals(), ROLLOUT),
        "denoise_seeds": denoise_seeds,
        "initial_noise": None if initial_noise is None else _encoded(initial_noise),
    }
    call = generate(prompt, **arguments)
    read = partial(decode_rollouts, shared=shared_memory)
    return Call("POST", "/rollout/generate", read, {**(call.body or {}), **given(fields)}, call.timeout_s)


def _encoded(tensor: torch.Tensor) -> dict[str, Any]:
    held = from_torch("initial_noise", tensor.float())
    data = write_header([("t", held.dtype, held.shape)]) + bytes(held.data)
    return {TENSOR: True, "data": base64.b64encode(data).decode("ascii")}
