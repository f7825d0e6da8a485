"""Adapters with random factors, as each trainer names them. No trainer is needed, only its names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Tensors = dict[str, torch.Tensor]
Weights = Mapping[str, tuple[int, ...]]
"""The shapes of weights, by the names of layers in whatever format."""

LETTERS = ("lora_A.weight", "lora_B.weight")
WORDS = ("lora_down.weight", "lora_up.weight")
DOTS = ("lora.down.weight", "lora.up.weight")
WITH_DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
NAMED = ("lora_A.learner_1.weight", "lora_B.learner_1.weight")
"""As the parameters of a model are called to which peft has added an adapter of that name."""


def adapter(
    weights: Weights,
    suffixes: tuple[str, str] = LETTERS,
    *,
    before: str = "",
    ranks: Sequence[int] = (4,),
    alphas: Sequence[float] = (),
) -> Tensors:
    """A pair for every layer; ranks and alphas are taken in turns. With no alphas, none is written."""
    made: Tensors = {}
    generator = torch.Generator().manual_seed(len(weights))
    for number, (layer, shape) in enumerate(weights.items()):
        rank = ranks[number % len(ranks)]
        name = f"{before}{layer}"
        made[f"{name}.{suffixes[0]}"] = torch.randn(rank, *shape[1:], generator=generator)
        made[f"{name}.{suffixes[1]}"] = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
        if alphas:
            made[f"{name}.alpha"] = torch.tensor(alphas[number % len(alphas)])
    return made


def some(weights: Weights, *endings: str) -> Weights:
    """The layers whose names end so."""
    found = {name: shape for name, shape in weights.items() if name.endswith(endings)}
    assert found
    return found


def attention(weights: Weights) -> Weights:
    return some(weights, "to_q", "to_k", "to_v", "to_out.0")


def underscores(weights: Weights) -> Weights:
    return {name.replace(".", "_"): shape for name, shape in weights.items()}


FLUX = {
    "double_blocks_0_img_attn_proj": (64, 64),
    "double_blocks_0_img_attn_qkv": (192, 64),
    "double_blocks_0_img_mlp_0": (256, 64),
    "double_blocks_0_img_mlp_2": (64, 256),
    "double_blocks_0_img_mod_lin": (384, 64),
    "double_blocks_0_txt_attn_proj": (64, 64),
    "double_blocks_0_txt_attn_qkv": (192, 64),
    "double_blocks_0_txt_mlp_0": (256, 64),
    "double_blocks_0_txt_mlp_2": (64, 256),
    "double_blocks_0_txt_mod_lin": (384, 64),
    "single_blocks_0_linear2": (64, 320),
    "single_blocks_0_modulation_lin": (192, 64),
}
"""The tiny FLUX under its first names; linear1 cannot be: the converter knows one width of it."""

CLIP = {
    "encoder_layers_0_self_attn_q_proj": (32, 32),
    "encoder_layers_0_self_attn_k_proj": (32, 32),
    "encoder_layers_0_self_attn_v_proj": (32, 32),
    "encoder_layers_0_self_attn_out_proj": (32, 32),
    "encoder_layers_1_mlp_fc1": (64, 32),
    "encoder_layers_1_mlp_fc2": (32, 64),
}


def kohya_flux(ranks: Sequence[int], alphas: Sequence[float]) -> Tensors:
    """sd-scripts for FLUX, with the first text encoder."""
    return {
        **adapter(FLUX, WORDS, before="lora_unet_", ranks=ranks, alphas=alphas),
        **adapter(CLIP, WORDS, before="lora_te1_text_model_", ranks=ranks, alphas=alphas),
    }


def split_qkv(tensors: Tensors, stem: str) -> Tensors:
    """sd-scripts' split_qkv: three factors side by side, each for its third of the output alone."""
    up = tensors[f"{stem}.lora_up.weight"]
    blocks = [part.chunk(3, dim=1)[number] for number, part in enumerate(up.chunk(3, dim=0))]
    return {**tensors, f"{stem}.lora_up.weight": torch.block_diag(*blocks)}


def mixture_flux(ranks: Sequence[int], alphas: Sequence[float], weights: Weights) -> Tensors:
    """diffusers' names with underscores, which another trainer writes for FLUX."""
    return adapter(underscores(attention(weights)), WORDS, before="lora_transformer_", ranks=ranks, alphas=alphas)


def xlabs_flux(rank: int) -> Tensors:
    """x-flux: attention processors with factors of their own."""
    names = {
        "double_blocks.0.processor.qkv_lora1": (192, 64),
        "double_blocks.0.processor.qkv_lora2": (192, 64),
        "double_blocks.0.processor.proj_lora1": (64, 64),
        "double_blocks.0.processor.proj_lora2": (64, 64),
        "single_blocks.0.processor.qkv_lora": (192, 64),
        "single_blocks.0.processor.proj_lora": (64, 320),
    }
    return adapter(names, ("down.weight", "up.weight"), ranks=(rank,))


def kohya_sdxl(ranks: Sequence[int], alphas: Sequence[float]) -> Tensors:
    """sd-scripts for SDXL: the UNet's first names, the numbers of its blocks counted through, and two text encoders."""
    unet = {
        "input_blocks_0_0": (16, 4, 3, 3),
        "time_embed_0": (64, 16),
        "input_blocks_1_0_in_layers_2": (16, 16, 3, 3),
        "input_blocks_1_0_emb_layers_1": (16, 64),
        "middle_block_1_proj_in": (32, 32),
        "middle_block_1_transformer_blocks_0_attn1_to_q": (32, 32),
        "middle_block_1_transformer_blocks_0_attn2_to_k": (32, 64),
        "middle_block_1_transformer_blocks_0_attn1_to_out_0": (32, 32),
        "middle_block_1_transformer_blocks_0_ff_net_0_proj": (256, 32),
        "middle_block_1_transformer_blocks_0_ff_net_2": (32, 128),
        "output_blocks_0_1_transformer_blocks_1_attn2_to_v": (32, 64),
        "out_2": (4, 16, 3, 3),
    }
    made = adapter(unet, WORDS, before="lora_unet_", ranks=ranks, alphas=alphas)
    for number in (1, 2):
        made |= adapter(CLIP, WORDS, before=f"lora_te{number}_text_model_", ranks=ranks, alphas=alphas[:1])
    return made


def a1111_sd15(weights: Weights, ranks: Sequence[int], alphas: Sequence[float]) -> Tensors:
    """The format of the first web UIs: diffusers' names with underscores, convolutions too, and one text encoder."""
    layers = some(weights, "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "net.0.proj", "net.2")
    return {
        **adapter(underscores(layers), WORDS, before="lora_unet_", ranks=ranks, alphas=alphas),
        **adapter(CLIP, WORDS, before="lora_te_text_model_", ranks=ranks, alphas=alphas[:1]),
    }


def old_diffusers(weights: Weights) -> Tensors:
    """diffusers' format from when attention processors had the factors: ``….processor.to_q_lora.down.weight``."""
    names: dict[str, tuple[int, ...]] = {}
    for name, shape in attention(weights).items():
        owner, _, layer = name.removesuffix(".0").rpartition(".")
        names[f"unet.{owner}.processor.{layer}_lora"] = shape
    return adapter(names, ("down.weight", "up.weight"))


_WAN = {
    "self_attn.q": (64, 64), "self_attn.k": (64, 64), "self_attn.v": (64, 64), "self_attn.o": (64, 64),
    "cross_attn.q": (64, 64), "cross_attn.k": (64, 64), "cross_attn.v": (64, 64), "cross_attn.o": (64, 64),
    "ffn.0": (64, 64), "ffn.2": (64, 64),
}  # fmt: skip

WAN = {f"blocks.{number}.{layer}": shape for number in (0, 1) for layer, shape in _WAN.items()}
"""The tiny Wan's blocks under their first names."""

WAN_OUTSIDE = {
    "time_projection.1": (384, 64),
    "head.head": (16, 64),
    "text_embedding.0": (64, 32),
    "text_embedding.2": (64, 64),
    "time_embedding.0": (64, 32),
    "time_embedding.2": (64, 64),
}


def musubi_wan(ranks: Sequence[int], alphas: Sequence[float]) -> Tensors:
    return adapter(underscores(WAN), WORDS, before="lora_unet_", ranks=ranks, alphas=alphas)


FLUX2 = {
    "double_blocks.0.img_attn.qkv": (192, 64),
    "double_blocks.0.img_attn.proj": (64, 64),
    "double_blocks.0.img_mlp.0": (384, 64),
    "double_blocks.0.img_mlp.2": (64, 192),
    "double_blocks.0.txt_attn.qkv": (192, 64),
    "double_blocks.0.txt_attn.proj": (64, 64),
    "double_blocks.0.txt_mlp.0": (384, 64),
    "double_blocks.0.txt_mlp.2": (64, 192),
    "single_blocks.0.linear1": (576, 64),
    "single_blocks.0.linear2": (64, 256),
    "img_in": (64, 16),
}
"""The tiny FLUX.2 under its first names."""

HUNYUAN = {
    "double_blocks.0.img_attn_qkv": (192, 64),
    "double_blocks.0.img_attn_proj": (64, 64),
    "double_blocks.0.img_mlp.fc1": (256, 64),
    "double_blocks.0.txt_attn_qkv": (192, 64),
    "double_blocks.0.txt_mod.linear": (384, 64),
    "single_blocks.0.linear2": (64, 320),
    "single_blocks.0.modulation.linear": (192, 64),
}
"""The tiny HunyuanVideo under its first names."""


def old_text_encoder() -> Tensors:
    """A text encoder's attention as diffusers wrote it, with its own names for the projections."""
    kinds = ("to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora")
    names = {f"text_encoder.text_model.encoder.layers.1.self_attn.{kind}": (32, 32) for kind in kinds}
    return adapter(names, ("down.weight", "up.weight"))


def product(tensors: Tensors, layer: str, suffixes: tuple[str, str] = LETTERS) -> torch.Tensor:
    return tensors[f"{layer}.{suffixes[1]}"] @ tensors[f"{layer}.{suffixes[0]}"]
