"""The record of a rollout in the form that is sent: a tree of plain values, and its tensors separately."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path as File
from typing import Any

import torch

from ...formats.digests import STORED_DTYPES
from ...formats.tensor_files import write_header
from ...protocol.codec import Buffer
from ...protocol.errors import Unavailable
from ...protocol.generation import Output
from ...protocol.rollouts import TENSOR, RolledOut, Rollout, Tensor
from .sampling import RecordedSteps


def recorded_fields(rollout: Rollout, steps: RecordedSteps, environment: dict[str, Any] | None) -> dict[str, Any]:
    """The recorded fields of a reply, with their tensors."""
    trajectory = debug = None
    if rollout.returns_trajectory:
        indices = sorted(steps.latents)
        timesteps, sigmas = [*steps.timesteps, 0.0], steps.sigmas
        trajectory = {
            "latents": torch.stack([steps.latents[index] for index in indices]) if indices else None,
            "latent_indices": indices,
            "timesteps": torch.tensor([timesteps[index] for index in indices], dtype=torch.float32),
            "sigmas": torch.tensor([sigmas[index] for index in indices], dtype=torch.float32),
        }
    if rollout.returns_debug and steps.means:
        debug = {
            "rollout_variance_noises": torch.stack(steps.noises),
            "rollout_prev_sample_means": torch.stack(steps.means),
            "rollout_model_outputs": torch.stack(steps.outputs),
            "rollout_noise_std_devs": torch.tensor(steps.stds, dtype=torch.float32)[:, None],
        }
    return {
        "rollout_log_probs": torch.stack(steps.log_probs),
        "rollout_debug_tensors": debug,
        "denoising_env": environment,
        "dit_trajectory": trajectory,
    }


def nothing_recorded() -> dict[str, Any]:
    """The fields of :func:`recorded_fields` for a plain generation, all ``None``."""
    return dict.fromkeys(("rollout_log_probs", "rollout_debug_tensors", "denoising_env", "dit_trajectory"))


def as_output(pixels: torch.Tensor, dtype: str) -> torch.Tensor:
    """Convert a picture [C, H, W] or clip [F, C, H, W] in [0, 1] to the reply's ``dtype`` and layout, [C(, F), H, W].

    For uint8, values are scaled and rounded to [0, 255].
    """
    ordered = pixels if pixels.ndim == 3 else pixels.transpose(0, 1)
    if dtype == "uint8":
        return (ordered.float().clamp(0, 1) * 255).round().to(torch.uint8)
    wanted: torch.dtype = getattr(torch, dtype)
    return ordered.to(wanted)


def on_the_host(value: Any, begin: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of the tree with contiguous tensors in host memory, so that encoding threads need not compute.

    ``begin`` copies a tensor from the device.
    """
    if isinstance(value, torch.Tensor):
        on_cpu = value.device.type == "cpu"
        return value.detach().clone(memory_format=torch.contiguous_format) if on_cpu else begin(value)
    if isinstance(value, Mapping):
        return {name: on_the_host(part, begin) for name, part in value.items()}
    return [on_the_host(part, begin) for part in value] if isinstance(value, list | tuple) else value


def encoded(tree: dict[str, Any], shared: File | None) -> RolledOut:
    """Encode the tree, with its tensors as buffers, or in a file below ``shared``.

    Raises ``Unavailable`` if there is no room for the file.
    """
    tensors: list[torch.Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return {TENSOR: len(tensors) - 1}
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        return value if isinstance(value, str | int | float | bool | None) else str(value)

    described = plain(tree)
    if shared is None:
        return RolledOut(reply=described, tensors=[_sent(tensor) for tensor in tensors])
    file = shared / f"rollout-{secrets.token_hex(8)}.safetensors"
    header = [(str(i), STORED_DTYPES[str(one.dtype)], tuple(one.shape)) for i, one in enumerate(tensors)]
    try:
        with file.open("xb") as written:
            written.writelines([write_header(header), *map(_bytes, tensors)])
    except OSError as error:
        file.unlink(missing_ok=True)
        raise Unavailable(f"There is no shared memory for the reply ({error.strerror}).") from error
    left = [Tensor(str(tensor.dtype), list(tensor.shape), Buffer(b"")) for tensor in tensors]
    return RolledOut(reply=described, tensors=left, file=str(file))


def forget(output: Output | None) -> None:
    """Delete the shared-memory file of a reply that will not be sent."""
    if output is not None and output.rolled_out is not None and output.rolled_out.file is not None:
        File(output.rolled_out.file).unlink(missing_ok=True)


def read_tensor(sent: Tensor) -> torch.Tensor:
    """A copy of a received tensor."""
    dtype: torch.dtype = getattr(torch, sent.dtype.removeprefix("torch."))
    return torch.frombuffer(bytearray(sent.data.data), dtype=dtype).view(sent.shape)


def _sent(tensor: torch.Tensor) -> Tensor:
    return Tensor(str(tensor.dtype), list(tensor.shape), Buffer(_bytes(tensor)))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer
