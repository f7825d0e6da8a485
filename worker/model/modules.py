"""A pipeline's components that are modules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from ..weights.checkpoint.layout import Layout
from ..weights.quantizing.layers import QuantizedLayer


def modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def are_finite(pipeline: DiffusionPipeline) -> bool:
    """True if every parameter and every scale of quantized weights on this rank is free of NaN and infinity."""
    tensors = (tensor for module in modules(pipeline).values() for tensor in (*module.parameters(), *_scales(module)))
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _scales(module: nn.Module) -> Iterator[torch.Tensor]:
    return (layer.scale for layer in module.modules() if isinstance(layer, QuantizedLayer))


def count_parameters(module: nn.Module, layout: Layout | None) -> int:
    """The parameters of all ranks together; a rank has only its part of a sharded one."""
    whole = Counter[str]()
    for entry in layout or ():
        whole[entry.tensor] += math.prod(entry.shape)
    quantized = sum(math.prod(layout[name].shape) for name in layout.codecs) if layout is not None else 0
    return quantized + sum(whole.get(name) or one.numel() for name, one in module.named_parameters())


def disable_kv_caches(pipeline: DiffusionPipeline) -> None:
    """Have language models that serve as text encoders return no key-value cache.

    The cache is large, cannot be cut into rows, and no pipeline reads it; the other outputs do not change.
    """
    for component in pipeline.components.values():
        if isinstance(component, PreTrainedModel):
            disable_kv_cache(component)


def disable_kv_cache(model: PreTrainedModel) -> None:
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "use_cache", False) and not getattr(config, "is_encoder_decoder", False):
            config.use_cache = False
