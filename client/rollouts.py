"""Decode rollout replies into torch tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..protocol.adapters import Drawn
from ..protocol.errors import Internal
from ..protocol.rollouts import TENSOR

if TYPE_CHECKING:
    import torch


_SHARED = re.compile(r"/[^.]*/safelight-[\w-]+/rollout-[0-9a-f]{16}\.safetensors")
"""Names of the server's rollout files in shared memory."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """``latents`` [N, ...] in fp32: ``latents[i]`` is x before step ``latent_indices[i]``; index T is the final x.

    ``timesteps`` [N] and ``sigmas`` [N] are the values used for these latents.
    """

    latents: torch.Tensor
    latent_indices: list[int]
    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def before(self, step: int) -> torch.Tensor:
        """x [1, ...] before ``step``. Raises ``ValueError`` if it was not requested."""
        if step not in self.latent_indices:
            raise ValueError(
                f"this trajectory has the latents at {self.latent_indices}, not at {step}; ask for them with "
                "return_steps (rollout_return_step_indices): a step k needs k and k + 1"
            )
        place = self.latent_indices.index(step)
        return self.latents[place : place + 1]

    def after(self, step: int) -> torch.Tensor:
        return self.before(step + 1)


@dataclass(frozen=True, eq=False)
class Rollout:
    """A sample, with the records that a trainer needs.

    ``output`` is [C, H, W] or [C, F, H, W], in [0, 1], or in [0, 255] for uint8. ``log_probs`` [T] are means over
    elements; without recording they are empty and ``sampler`` is ``None``. ``environment`` has the denoiser's
    arguments (see :mod:`safelight.rollout.replay`) and a copy of ``adapters``, which were active; ``debug`` has
    tensors [T, ...] by name. ``step_weight_versions`` [T] is ``None`` for a step during which the weights changed.
    """

    request_id: str
    prompt: str
    seed: int
    output: torch.Tensor
    log_probs: torch.Tensor
    trajectory: Trajectory | None
    environment: dict[str, Any] | None
    debug: dict[str, torch.Tensor] | None
    weight_version: str
    weight_versions: list[str]
    step_weight_versions: list[str | None]
    adapters: list[Drawn]
    sampler: str | None
    inference_time_s: float
    peak_memory_mb: float


def decode_rollouts(reply: bytes, server: str, *, shared: bool) -> list[Rollout]:
    """Decode a reply, and remove its files in shared memory, if these were requested. Raises ``Internal``."""
    try:
        return [_rollout(sample, shared=shared) for sample in msgspec.msgpack.decode(reply, type=list[dict[str, Any]])]
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, OSError) as error:
        raise Internal(f"The reply from {server} has no rollouts ({type(error).__name__}: {error}).") from None


def _rollout(sample: dict[str, Any], *, shared: bool) -> Rollout:
    files = _Files(shared)
    try:
        whole = _with_tensors(sample, files)
    finally:
        files.remove()
    trajectory, environment = whole["dit_trajectory"], whole["denoising_env"]
    return Rollout(
        request_id=whole["request_id"],
        prompt=whole["prompt"],
        seed=whole["seed"],
        output=whole["generated_output"],
        log_probs=_empty() if whole["rollout_log_probs"] is None else whole["rollout_log_probs"],
        trajectory=None if trajectory is None else Trajectory(**trajectory),
        environment=None if environment is None else environment | {"adapters": whole["adapters"]},
        debug=whole["rollout_debug_tensors"],
        weight_version=whole["weight_version"],
        weight_versions=whole["weight_versions"],
        step_weight_versions=whole["step_weight_versions"],
        adapters=[Drawn(**one) for one in whole["adapters"]],
        sampler=whole["sampler"],
        inference_time_s=whole["inference_time_s"],
        peak_memory_mb=whole["peak_memory_mb"],
    )


def _empty() -> torch.Tensor:
    import torch

    return torch.empty(0)


def _with_tensors(value: Any, files: _Files) -> Any:
    if isinstance(value, dict) and value.get(TENSOR) is True:
        return _tensor(value, files)
    if isinstance(value, dict):
        return {name: _with_tensors(part, files) for name, part in value.items()}
    return [_with_tensors(part, files) for part in value] if isinstance(value, list) else value


def _tensor(encoded: dict[str, Any], files: _Files) -> torch.Tensor:
    from safetensors.torch import load

    return load(encoded["data"])["t"] if "file" not in encoded else files.tensor(encoded["file"], encoded["name"])


class _Files:
    """Reads files of a server's directory in shared memory; other paths in a reply are neither read nor removed."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self._read: dict[Path, dict[str, torch.Tensor]] = {}

    def tensor(self, file: str, name: str) -> torch.Tensor:
        from safetensors.torch import load_file

        path = Path(file)
        if not self._allowed or not _SHARED.fullmatch(file) or path.is_symlink():
            raise ValueError(f"{file[:200]} is not a file that the call requested")
        if path not in self._read:
            self._read[path] = {}
            self._read[path] = load_file(path)
        return self._read[path][name]

    def remove(self) -> None:
        for path in self._read:
            path.unlink(missing_ok=True)
