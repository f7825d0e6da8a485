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
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
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
"""Blocks of two levels with one layer each, as in the tiny UNets."""

_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3",
    "attn1": "self_attn", "attn2": "cross_attn", "to_out.0": "o", "to_q": "q", "to_k": "k", "to_v": "v",
}  # fmt: skip


_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
    "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn",
}  # fmt: skip

_FLUX = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}  # fmt: skip
_FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale", "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
}  # fmt: skip
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin", "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale", "proj_out": "linear2",
}  # fmt: skip
_FLUX_TOGETHER = {
    "transformer_blocks": {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "single_transformer_blocks": {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
}
"""Layers that are one in the original."""


def sd15_file(checkpoint: Path, file: Path) -> Path:
    """The tiny Stable Diffusion 1.5 of ``checkpoint`` in one file: UNet, autoencoder and text encoder."""
    return _saved(file, _unet_and_vae(checkpoint) | _clip(checkpoint, "cond_stage_model.transformer."))


def sdxl_file(checkpoint: Path, file: Path) -> Path:
    """The tiny SDXL of ``checkpoint`` in one file, its second text encoder as OpenCLIP names and lays it out."""
    second = _open_clip(_weights(checkpoint / "text_encoder_2"))
    texts = _clip(checkpoint, "conditioner.embedders.0.transformer.") | _under("conditioner.embedders.1.model.", second)
    return _saved(file, _unet_and_vae(checkpoint) | texts)


def flux_file(checkpoint: Path, file: Path, *, tied: bool = False) -> Path:
    """The tiny FLUX of ``checkpoint`` in one file, with its autoencoder and both text encoders.

    ``tied`` leaves out the second name of the T5's embeddings, which plain diffusers does not find again.
    """
    whole = _under("model.diffusion_model.", _flux(_weights(checkpoint / "transformer"))) | _vae(checkpoint, "vae.")
    t5 = _weights(checkpoint / "text_encoder_2")
    t5 |= {} if tied else {"encoder.embed_tokens.weight": t5["shared.weight"].clone()}
    second = _under("text_encoders.t5xxl.transformer.", t5)
    return _saved(file, whole | _clip(checkpoint, "text_encoders.clip_l.transformer.") | second)


def _saved(file: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _unet_and_vae(checkpoint: Path) -> Tensors:
    unet = {_replaced(_resnet(name), _UNET): tensor for name, tensor in _weights(checkpoint / "unet").items()}
    return _under("model.diffusion_model.", unet) | _vae(checkpoint, "first_stage_model.")


def _vae(checkpoint: Path, prefix: str) -> Tensors:
    return _under(prefix, {_autoencoder_name(name): tensor for name, tensor in _weights(checkpoint / "vae").items()})


def _clip(checkpoint: Path, prefix: str) -> Tensors:
    text = _weights(checkpoint / "text_encoder")
    return _under(f"{prefix}text_model.", {name.removeprefix("text_model."): tensor for name, tensor in text.items()})


def _open_clip(tensors: Tensors) -> Tensors:
    """Queries, keys and values are one matrix, and the projection is transposed."""
    found = {"text_projection": tensors["text_projection.weight"].T}
    for name, tensor in tensors.items():
        layer, split, of_query = name.partition(".q_proj.")
        if split:
            together = [tensors[f"{layer}.{part}_proj.{of_query}"] for part in "qkv"]
            found[f"{_replaced(layer, _OPEN_CLIP)}.in_proj_{of_query}"] = torch.cat(together)
        elif not any(part in name for part in (".k_proj.", ".v_proj.", "text_projection")):
            found[_replaced(name, _OPEN_CLIP)] = tensor
    return found


def _flux(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        if "transformer_blocks" not in name:
            halves = tensor.chunk(2)
            found[_replaced(name, _FLUX)] = torch.cat([halves[1], halves[0]]) if "norm_out" in name else tensor
            continue
        blocks, number, part = name.split(".", 2)
        double = blocks == "transformer_blocks"
        block = f"{'double' if double else 'single'}_blocks.{number}"
        layer, _, kind = part.rpartition(".")
        for original, parts in _FLUX_TOGETHER[blocks].items():
            if layer == parts[0]:
                one = [tensors[f"{blocks}.{number}.{each}.{kind}"] for each in parts]
                found[f"{block}.{original}.{kind}"] = torch.cat(one)
        if not any(layer in parts for parts in _FLUX_TOGETHER[blocks].values()):
            found[f"{block}.{_replaced(part, _FLUX_DOUBLE if double else _FLUX_SINGLE)}"] = tensor
    return found


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
