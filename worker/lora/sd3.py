"""sd-scripts' names for Stable Diffusion 3, whose adapters diffusers has no converter for.

The layers are those of diffusers' converter of checkpoints (``convert_sd3_transformer_checkpoint_to_diffusers``), with
underscores for dots and ``lora_unet_`` before them: fused projections are q, k and v in thirds of the outputs, and
where diffusers' last normalisations scale first and shift then, the halves change places.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

_BLOCK = re.compile(r"lora_unet_joint_blocks_(?P<number>\d{1,4})_(?P<stream>x|context)_block_(?P<layer>\w+)")

_FUSED = {
    ("x", "attn_qkv"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("x", "attn2_qkv"): ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    ("context", "attn_qkv"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}

_LAYERS = {
    ("x", "attn_proj"): "attn.to_out.0",
    ("x", "attn2_proj"): "attn2.to_out.0",
    ("x", "mlp_fc1"): "ff.net.0.proj",
    ("x", "mlp_fc2"): "ff.net.2",
    ("x", "adaLN_modulation_1"): "norm1.linear",
    ("context", "attn_proj"): "attn.to_add_out",
    ("context", "mlp_fc1"): "ff_context.net.0.proj",
    ("context", "mlp_fc2"): "ff_context.net.2",
    ("context", "adaLN_modulation_1"): "norm1_context.linear",
}

_OUTSIDE = {
    "lora_unet_x_embedder_proj": "pos_embed.proj",
    "lora_unet_context_embedder": "context_embedder",
    "lora_unet_t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "lora_unet_t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "lora_unet_y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "lora_unet_y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "lora_unet_final_layer_linear": "proj_out",
    "lora_unet_final_layer_adaLN_modulation_1": "norm_out.linear",
}

_MODULATIONS_OF_THE_LAST_CONTEXT = 2
"""Scale and shift alone, in diffusers' order; earlier blocks have six in the order of the checkpoint."""


def is_sd3(layer: str) -> bool:
    return _BLOCK.fullmatch(layer) is not None


def sd3_targets(layer: str, out: int, width: int) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The model's layers that a layer of the file is, each with the rows of it that it has; all rows where ``None``.

    ``out`` is the layer's number of outputs, and ``width`` the transformer's.
    """
    if (name := _OUTSIDE.get(layer)) is not None:
        yield f"transformer.{name}", _halves_turned(out) if name == "norm_out.linear" else None
    elif (match := _BLOCK.fullmatch(layer)) is not None:
        where = f"transformer.transformer_blocks.{int(match['number'])}"
        kind = match["stream"], match["layer"]
        if (names := _FUSED.get(kind)) is not None:
            for name, rows in zip(names, torch.arange(out).chunk(3), strict=True):
                yield f"{where}.{name}", rows
        elif (name := _LAYERS.get(kind)) is not None:
            last = name == "norm1_context.linear" and out == _MODULATIONS_OF_THE_LAST_CONTEXT * width
            yield f"{where}.{name}", _halves_turned(out) if last else None


def _halves_turned(out: int) -> torch.Tensor:
    return torch.cat(torch.arange(out).chunk(2)[::-1])
