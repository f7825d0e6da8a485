"""Quantizes the components of a loaded pipeline, as ``--quantize`` says."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ....protocol.errors import StartFailed
from ....protocol.replicas import Quantized
from ..checkpoint.components import components
from ..checkpoint.pipeline import LoadedPipeline
from .quantize import quantize
from .wanted import wanted_schemes

log = logging.getLogger(__name__)


def quantize_pipeline(
    loaded: LoadedPipeline,
    modules: Mapping[str, nn.Module],
    option: str,
    directory: Path,
    *,
    variant: str | None,
    dtype: torch.dtype,
    ranks: int,
) -> dict[str, Quantized]:
    """Quantize components in host memory. Raises ``StartFailed`` for one that cannot be."""
    schemes = wanted_schemes(option, (name for name in modules if name in loaded.layouts))
    if dynamic := [name for name, scheme in schemes.items() if scheme.dynamic]:
        if ranks > 1:
            raise StartFailed(f"--quantize {dynamic[0]}=fp8-dynamic works with --tp 1; take fp8 with more ranks.")
        if dtype != torch.bfloat16:
            raise StartFailed(f"--quantize {dynamic[0]}=fp8-dynamic computes in bfloat16; give --dtype bfloat16.")
    found = components(directory, variant)
    quantized: dict[str, Quantized] = {}
    for name, scheme in schemes.items():
        quantized[name] = quantize(name, modules[name], loaded.layouts[name], scheme, dtype, found[name].files)
        one = quantized[name]
        log.info(
            "%s: %d layers are %s, of %.1f MB in place of %.1f MB; %.1f MB of their values are kept on the host",
            *(
                name,
                one.layers,
                one.scheme,
                one.bytes_after / 1e6,
                one.bytes_before / 1e6,
                one.base_on_host_bytes / 1e6,
            ),
        )
    return quantized
