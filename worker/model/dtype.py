"""The dtype in which a checkpoint is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...protocol.config import Config
from ..pipelines.components import DENOISERS
from ..weights.checkpoint.components import components
from ..weights.checkpoint.files import WeightFiles


def choose_dtype(config: Config, device: torch.device, stored: Callable[[], str | None]) -> torch.dtype:
    """``config.dtype``, or with "auto" what the device multiplies.

    That is bf16 on a GPU that has it, else fp16; on a CPU bf16 if the CPU has it and the checkpoint is ``stored`` so.
    """
    if config.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.dtype)
        return chosen
    if device.type == "cuda":
        # of the current device, as ranks have GPUs of one kind; emulated, as before Ampere, it is slower than fp16
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if _multiplies_bfloat16() and stored() == "BF16":
        return torch.bfloat16
    return torch.float32


def stored_dtype(directory: Path, variant: str | None = None) -> str | None:
    """The safetensors name of the dtype of most parameters in the denoiser's first file; ``None`` without a file.

    With a ``variant`` ("…model.fp16.safetensors"), that is the variant's file.
    """
    for name, component in components(directory, variant).items():
        if name in DENOISERS and component.is_model and (files := component.files):
            return most_common_dtype(files[:1])
    return None


def most_common_dtype(files: Sequence[Path]) -> str:
    sizes = Counter[str]()
    with WeightFiles(files) as opened:
        for name in opened:
            sizes[opened[name].get_dtype()] += math.prod(opened[name].get_shape())
    return sizes.most_common(1)[0][0]


def _multiplies_bfloat16() -> bool:
    """True if this CPU has instructions for bfloat16 products (AVX-512 BF16, AMX, or Arm's)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
