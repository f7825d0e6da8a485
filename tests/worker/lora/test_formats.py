"""An adapter adds to every layer what plain diffusers and peft would add to it, for every writer of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelight.tests.tiny import FAMILIES

from . import formats
from .formats import DOTS, LETTERS, WITH_DEFAULT, WORDS, Tensors, Weights, adapter, attention, product, some
from .plain import Deltas, assert_same, by_diffusers, deltas, read, shapes_of, written

RANKS = (4, 6)
ALPHAS = (2.0, 16.0, 2.5)
"""Below and above the ranks, and one that is not an integer."""


def linear(name: str, component: str = "transformer") -> Weights:
    """Every layer of a tiny model's component that an adapter can change."""
    shapes = shapes_of(FAMILIES[name].build())[component]
    return {layer: shape for layer, shape in shapes.items() if len(shape) > 1}


def _wan_outside() -> Tensors:
    return adapter({**formats.WAN, **formats.WAN_OUTSIDE}, LETTERS, before="diffusion_model.", ranks=RANKS)


FILES: dict[str, tuple[str, Callable[[], Tensors], str]] = {
    "flux diffusers": ("flux", lambda: adapter(linear("flux"), before="transformer.", ranks=RANKS)),
    "flux diffusers, words": ("flux", lambda: adapter(linear("flux"), WORDS, before="transformer.")),
    "flux diffusers, alphas": (
        "flux", lambda: adapter(attention(linear("flux")), before="transformer.", ranks=RANKS, alphas=ALPHAS)
    ),
    "flux kohya": ("flux", lambda: formats.kohya_flux(RANKS, ALPHAS)),
    "flux kohya, no alphas": ("flux", lambda: formats.kohya_flux(RANKS, ())),
    "flux kohya, split": (
        "flux",
        lambda: formats.split_qkv(formats.kohya_flux((6,), ALPHAS), "lora_unet_double_blocks_0_img_attn_qkv")
    ),
    "flux mixture": ("flux", lambda: formats.mixture_flux(RANKS, ALPHAS, linear("flux"))),
    "flux xlabs": ("flux", lambda: formats.xlabs_flux(4)),
    "sd3 diffusers": ("sd3", lambda: adapter(linear("sd3"), before="transformer.", ranks=RANKS)),
    "sd3 text encoders": (
        "sd3",
        lambda: {
            **adapter(attention(linear("sd3")), before="transformer."),
            **adapter(
                some(linear("sd3", "text_encoder_2"), "q_proj", "v_proj", "out_proj"), before="text_encoder_2."
            ),
        }
    ),
    "sdxl kohya": ("sdxl", lambda: formats.kohya_sdxl(RANKS, (2.5,))),
    "sdxl diffusers": ("sdxl", lambda: adapter(linear("sdxl", "unet"), before="unet.", ranks=RANKS)),
    "sdxl diffusers, dots": (
        "sdxl", lambda: adapter(attention(linear("sdxl", "unet")), DOTS, before="unet.")
    ),
    "sdxl old text encoder": ("sdxl", formats.old_text_encoder),
    "sd15 a1111": ("sd15", lambda: formats.a1111_sd15(linear("sd15", "unet"), RANKS, (2.5,))),
    "sd15 old diffusers": ("sd15", lambda: formats.old_diffusers(linear("sd15", "unet"))),
    "wan diffusers": ("wan", lambda: adapter(linear("wan"), before="transformer.", ranks=RANKS)),
    "wan musubi": ("wan", lambda: formats.musubi_wan(RANKS, ALPHAS)),
    "wan original": ("wan", _wan_outside),
    "wan original, words": (
        "wan", lambda: adapter(formats.WAN, WORDS, before="diffusion_model.", ranks=RANKS, alphas=ALPHAS)
    ),
    "wan22": ("wan22", lambda: formats.musubi_wan(RANKS, ALPHAS)),
    "qwen kohya": (
        "qwenimage",
        lambda: adapter(
            formats.underscores(linear("qwenimage")), WORDS, before="lora_unet_", ranks=RANKS, alphas=ALPHAS
        )
    ),
    "qwen ai-toolkit": (
        "qwenimage", lambda: adapter(linear("qwenimage"), before="diffusion_model.", ranks=RANKS)
    ),
    "qwen default": ("qwenimage", lambda: adapter(attention(linear("qwenimage")), WITH_DEFAULT)),
    "zimage kohya": (
        "zimage",
        lambda: adapter(
            formats.underscores(some(linear("zimage"), "to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")),
            WORDS, before="lora_unet_", ranks=RANKS, alphas=ALPHAS,
        )
    ),
    "zimage kohya, fused": (
        "zimage",
        lambda: adapter(
            {"layers_0_attention_qkv": (288, 96), "layers_1_attention_out": (96, 96)}, WORDS,
            before="lora_unet_", ranks=RANKS, alphas=ALPHAS,
        )
    ),
    "flux2 kohya": (
        "flux2",
        lambda: adapter(
            formats.underscores(formats.FLUX2), WORDS, before="lora_unet_", ranks=RANKS, alphas=ALPHAS
        )
    ),
    "flux2 ai-toolkit": (
        "flux2", lambda: adapter(formats.FLUX2, before="diffusion_model.", ranks=RANKS)
    ),
    "hunyuan original": ("hunyuan_video", lambda: adapter(formats.HUNYUAN, ranks=RANKS)),
    "zimage ai-toolkit": (
        "zimage", lambda: adapter(attention(linear("zimage")), before="diffusion_model.", alphas=ALPHAS)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_every_layer_gets_what_diffusers_would_add_to_it(case: str, tmp_path: Path) -> None:
    name, make = FILES[case]
    path = written(tmp_path / "adapter_model.safetensors", make())
    file = read(name, path)
    assert_same(deltas(file), by_diffusers(name, path))


@pytest.mark.parametrize("before", ["lycoris_", "lora_unet_", "lora_transformer_"])
@pytest.mark.parametrize("name", ["sd3", "ltx"])
def test_underscores_for_dots_are_read_where_diffusers_has_no_converter_for_them(
    name: str, before: str, tmp_path: Path
) -> None:
    """SimpleTuner writes so for any model. The truth is the same adapter under diffusers' names."""
    layers = attention(linear(name))
    dotted = adapter(layers, before="transformer.", ranks=RANKS)
    theirs = by_diffusers(name, written(tmp_path / "dotted.safetensors", dotted))
    path = written(tmp_path / "a.safetensors", adapter(formats.underscores(layers), WORDS, before=before, ranks=RANKS))
    assert_same(deltas(read(name, path)), theirs)


def test_parameters_of_a_peft_model_carry_any_adapter_s_name(tmp_path: Path) -> None:
    layers = attention(linear("sd3"))
    theirs = by_diffusers("sd3", written(tmp_path / "saved.safetensors", adapter(layers, before="transformer.")))
    path = written(tmp_path / "a.safetensors", adapter(layers, formats.NAMED, before="base_model.model."))
    assert_same(deltas(read("sd3", path)), theirs)


def test_factors_of_lycoris_are_for_the_layer_that_their_name_means(tmp_path: Path) -> None:
    layers = attention(linear("sd3"))
    tensors = {}
    for layer, (rows, columns) in formats.underscores(layers).items():
        tensors[f"lycoris_{layer}.lokr_w1"] = torch.ones(4, 4)
        tensors[f"lycoris_{layer}.lokr_w2"] = torch.ones(rows // 4, columns // 4)
    found = read("sd3", written(tmp_path / "a.safetensors", tensors))
    assert {(change.component, change.layer) for change in found.changes} == {("transformer", name) for name in layers}


OTHERS = ("chroma", "auraflow", "ltx", "cogvideox", "lumina2", "sana", "qwenimage_edit")


@pytest.mark.parametrize("name", OTHERS)
def test_diffusers_own_names_are_read_for_every_family(name: str, tmp_path: Path) -> None:
    weights = {layer: shape for layer, shape in linear(name).items() if not layer.endswith("conv_depth")}
    path = written(tmp_path / "adapter_model.safetensors", adapter(weights, before="transformer.", ranks=RANKS))
    assert_same(deltas(read(name, path)), by_diffusers(name, path))


MIXED: dict[str, tuple[str, Callable[[], Tensors]]] = {
    "sdxl": ("sdxl", lambda: formats.kohya_sdxl(RANKS, ALPHAS)),
    "sd15": ("sd15", lambda: formats.a1111_sd15(linear("sd15", "unet"), RANKS, ALPHAS)),
}


@pytest.mark.parametrize("case", MIXED)
def test_each_layer_has_its_own_alpha_where_diffusers_mixes_them_up(case: str, tmp_path: Path) -> None:
    """Diffusers makes patterns of alphas that differ, and a UNet's match no layer; so it gets the layers of each
    alpha in a file of their own."""
    name, make = MIXED[case]
    tensors = make()
    apart: Deltas = {}
    for alpha in ALPHAS:
        layers = tuple(
            f"{n.removesuffix('.alpha')}." for n, t in tensors.items() if n.endswith(".alpha") and t == alpha
        )
        path = written(tmp_path / f"{alpha}.safetensors", {n: t for n, t in tensors.items() if n.startswith(layers)})
        apart |= by_diffusers(name, path)
    assert_same(deltas(read(name, written(tmp_path / "all.safetensors", tensors))), apart)


def test_a_layer_is_not_taken_for_another_whose_name_ends_so(tmp_path: Path) -> None:
    weights = {"proj_out": (16, 64), "single_transformer_blocks.0.proj_out": (64, 320)}
    tensors = adapter(weights, before="transformer.", alphas=(2.0, 16.0))
    path = written(tmp_path / "adapter_model.safetensors", tensors)
    expected = {
        ("transformer", layer): scale
        * tensors[f"transformer.{layer}.lora_B.weight"]
        @ tensors[f"transformer.{layer}.lora_A.weight"]
        for layer, scale in zip(weights, (0.5, 4.0), strict=True)
    }
    assert_same(deltas(read("flux", path)), expected)


def test_a_layer_outside_of_the_blocks_is_read_where_diffusers_loses_it(tmp_path: Path) -> None:
    """Its converter gives such layers of FLUX no component's name, and drops the last layer's alpha."""
    tensors = adapter({"img_in": (64, 16), "final_layer_linear": (16, 64)}, WORDS, before="lora_unet_", alphas=(8.0,))
    path = written(tmp_path / "adapter_model.safetensors", tensors)
    expected = {
        ("transformer", layer): 2 * product(tensors, name, WORDS)
        for layer, name in {"x_embedder": "lora_unet_img_in", "proj_out": "lora_unet_final_layer_linear"}.items()
    }
    assert_same(deltas(read("flux", path)), expected)


def test_the_order_of_scale_and_shift_is_turned_around_with_the_last_modulation(tmp_path: Path) -> None:
    name = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = adapter({"final_layer_adaLN_modulation_1": (128, 64)}, WORDS, before="lora_unet_", alphas=(6.0,))
    path = written(tmp_path / "adapter_model.safetensors", tensors)
    shift, scale = (1.5 * product(tensors, name, WORDS)).chunk(2)
    assert_same(deltas(read("flux", path)), {("transformer", "norm_out.linear"): torch.cat([scale, shift])})


def test_alphas_that_a_converter_does_not_know_apply(tmp_path: Path) -> None:
    """Wan's knows them for layers in blocks alone."""
    weights = {**formats.WAN, **formats.WAN_OUTSIDE}
    tensors = adapter(weights, WORDS, before="diffusion_model.", alphas=(2.0,))
    path = written(tmp_path / "adapter_model.safetensors", tensors)
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    unscaled = by_diffusers("wan", written(tmp_path / "without.safetensors", without))
    assert_same(deltas(read("wan", path)), {place: delta / 2 for place, delta in unscaled.items()})
