"""Tiny checkpoints in one file, under the names of the models' first authors: what diffusers converts, backwards."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.0": "middle_block.0",
    "mid_block.resnets.1": "middle_block.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0": "output_blocks.1.2",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
}  # fmt: skip
"""Of two levels with one layer each, as the tiny UNets have."""

_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3",
    "attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "o", "to_q": "q", "to_k": "k", "to_v": "v",
}  # fmt: skip


def sd15_file(checkpoint: Path, file: Path) -> Path:
    """The tiny Stable Diffusion 1.5 of ``checkpoint`` in one file: UNet, autoencoder and text encoder."""
    unet = {_replaced(_resnet(name), _UNET): tensor for name, tensor in _weights(checkpoint / "unet").items()}
    vae = {_autoencoder_name(name): tensor for name, tensor in _weights(checkpoint / "vae").items()}
    text = _weights(checkpoint / "text_encoder")
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    whole |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    whole |= {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in text.items()
    }
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, file)
    return file


def wan_tensors(checkpoint: Path) -> Tensors:
    """The tiny Wan transformer of ``checkpoint`` under the names of Wan's own files."""

    def original(name: str) -> str:
        if name == "scale_shift_table":
            return "head.modulation"
        return _replaced(name, _WAN).replace("scale_shift_table", "modulation")

    return {original(name): tensor for name, tensor in _weights(checkpoint / "transformer").items()}


def _weights(folder: Path) -> Tensors:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _resnet(name: str) -> str:
    return _replaced(name, _RESNET) if ".resnets." in name else name


def _autoencoder_name(name: str) -> str:
    def mirrored(match: re.Match[str]) -> str:
        return f"up.{3 - int(match[1])}."

    name = re.sub(r"up_blocks\.(\d)\.", mirrored, name).replace("down_blocks.", "down.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = name.replace(".resnets.", ".block.").replace("samplers.0.", "sample.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def _replaced(name: str, names: dict[str, str]) -> str:
    """``name`` with every whole dotted part in ``names`` replaced once, the longest first."""
    for old in sorted(names, key=len, reverse=True):
        found = re.search(rf"(?<![^.]){re.escape(old)}(?![^.])", name)
        if found is not None:
            name = name[: found.start()] + names[old] + name[found.end() :]
    return name
