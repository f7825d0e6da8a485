"""What the server recorded of a generation, as torch tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..protocol.adapters import Drawn
from ..protocol.errors import Internal
from ..protocol.rollouts import TENSOR
from .calls import Call

if TYPE_CHECKING:
    import torch


_SHARED = re.compile(r"/[^.]*/safelight-[\w-]+/rollout-[0-9a-f]{16}\.safetensors")
"""How the server names them."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """``latents`` [places, ...] in fp32: x before step ``latent_indices[i]``, and behind the last step the final x.

    ``timesteps`` and ``sigmas`` [places] are those of the latents, as they were used.
    """

    latents: torch.Tensor
    latent_indices: list[int]
    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def before(self, step: int) -> torch.Tensor:
        """x [1, ...] before ``step``. Raises ``ValueError`` where it was not asked for."""
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
    """A sample with what a trainer learns from.

    ``output`` is [C, H, W] or [C, F, H, W], in [0, 1], or in [0, 255] if it is uint8. ``log_probs`` is [T], means over
    elements; it is empty, and ``sampler`` ``None``, if the sample was not recorded. ``environment`` is what the
    denoiser was given (see :mod:`safelight.rollout.replay`), and ``adapters`` once more; ``debug`` are tensors [T, ...]
    by name.
    ``step_weight_versions`` [T] has ``None`` where the weights changed between the denoiser's calls of one step;
    ``adapters`` had a part in the sample.
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


def decode_rollouts(reply: bytes, call: Call, server: str) -> list[Rollout]:
    """Raises ``Internal`` for what is no reply to ``call``. Files are read and removed, if it asked for them."""
    shared = bool(call.body and call.body.get("rollout_shared_memory"))
    try:
        return [_rollout(told, shared=shared) for told in msgspec.msgpack.decode(reply, type=list[dict[str, Any]])]
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, OSError) as error:
        raise Internal(f"What answers at {server} sent no rollouts ({type(error).__name__}: {error}).") from None


def _rollout(told: dict[str, Any], *, shared: bool) -> Rollout:
    files = _Files(shared)
    try:
        whole = _with_tensors(told, files)
    finally:
        files.remove()
    trajectory, environment = whole["dit_trajectory"], whole["denoising_env"]
    return Rollout(
        request_id=whole["request_id"],
        prompt=whole["prompt"],
        seed=whole["seed"],
        output=whole["generated_output"],
        log_probs=_none() if whole["rollout_log_probs"] is None else whole["rollout_log_probs"],
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


def _none() -> torch.Tensor:
    import torch

    return torch.empty(0)


def _with_tensors(value: Any, files: _Files) -> Any:
    if isinstance(value, dict) and value.get(TENSOR) is True:
        return _tensor(value, files)
    if isinstance(value, dict):
        return {name: _with_tensors(part, files) for name, part in value.items()}
    return [_with_tensors(part, files) for part in value] if isinstance(value, list) else value


def _tensor(told: dict[str, Any], files: _Files) -> torch.Tensor:
    from safetensors.torch import load

    return load(told["data"])["t"] if "file" not in told else files.tensor(told["file"], told["name"])


class _Files:
    """Files of a server's directory in shared memory; others are neither read nor removed, whatever a reply names."""

    def __init__(self, allowed: bool) -> None:
        self._allowed = allowed
        self._read: dict[Path, dict[str, torch.Tensor]] = {}

    def tensor(self, file: str, name: str) -> torch.Tensor:
        from safetensors.torch import load_file

        path = Path(file)
        if not self._allowed or not _SHARED.fullmatch(file) or path.is_symlink():
            raise ValueError(f"{file[:200]} is no file that was asked for")
        if path not in self._read:
            self._read[path] = {}
            self._read[path] = load_file(path)
        return self._read[path][name]

    def remove(self) -> None:
        for path in self._read:
            path.unlink(missing_ok=True)
