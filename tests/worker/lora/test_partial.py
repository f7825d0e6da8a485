"""Files that are more than an adapter of this model: copies count once, and what has no place is left out by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from msgspec.structs import replace
from safetensors.torch import save_file

from safelight.protocol.adapters import ADAPTER_FILE
from safelight.protocol.errors import InvalidRequest
from safelight.tests.tiny import FAMILIES
from safelight.worker.model.model import Model

from .agreement import change, new_adapters, source
from .formats import CLIP, WAN, WORDS, Tensors, adapter, attention, product
from .plain import assert_same, by_diffusers, deltas, read, shapes_of, written
from .whole_weights import setting

IMAGE_LAYERS = {
    "blocks.0.cross_attn.k_img": (64, 64),
    "blocks.1.cross_attn.v_img": (64, 64),
    "blocks.0.cross_attn.v_img": (64, 64),
    "img_emb.proj.1": (64, 64),
}
"""The additional layers of a Wan that begins with an image."""


def test_layers_for_images_are_left_out_of_a_model_that_has_none_and_listed(tmp_path: Path) -> None:
    tensors = adapter({**WAN, **IMAGE_LAYERS}, WORDS, before="diffusion_model.", alphas=(2.0,))
    path = written(tmp_path / "all.safetensors", tensors)
    with pytest.raises(InvalidRequest, match="layers that the model does not have"):
        read("wan", path)
    file = read("wan", path, strict=False)
    assert file.left == sorted(f"diffusion_model.{layer}" for layer in IMAGE_LAYERS)
    own = {name: t for name, t in tensors.items() if not any(layer in name for layer in IMAGE_LAYERS)}
    assert_same(deltas(file), by_diffusers("wan", written(tmp_path / "own.safetensors", own)))


def test_a_component_without_adapters_is_left_out_and_the_reply_lists_its_layers(
    tiny_model: Callable[[str], Model], tmp_path: Path
) -> None:
    model = tiny_model("flux")
    weights = attention(shapes_of(model.pipeline)["transformer"])
    foreign = adapter({"video_connector.to_q": (8, 8), "audio_connector.to_q": (8, 8)}, before="connectors.")
    (tmp_path / "x").mkdir()
    save_file({**adapter(weights, before="transformer."), **foreign}, tmp_path / "x" / ADAPTER_FILE)
    adapters = new_adapters(model)
    with pytest.raises(InvalidRequest, match=r"connectors\.\w+_connector\.to_q"):
        adapters.prepare(setting(tmp_path / "x"))
    change(adapters, replace(setting(tmp_path / "x"), sources=[replace(source(tmp_path / "x", "x"), strict=False)]))
    assert adapters.state.loaded["x"].left == ["connectors.audio_connector.to_q", "connectors.video_connector.to_q"]
    assert "x: 2 layers have no place in the model" in adapters.notes[0]


def test_kinds_that_cannot_be_applied_are_left_out_only_where_that_is_asked_for(tmp_path: Path) -> None:
    weights = attention(shapes_of(FAMILIES["flux"].build())["transformer"])
    tensors = {**adapter(weights, before="transformer."), "transformer.x.diff_m": torch.ones(4)}
    path = written(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(InvalidRequest, match=r"differences of modulations \(diff_m\)"):
        read("flux", path)
    assert read("flux", path, strict=False).left == ["transformer.x.diff_m"]


def test_a_layer_with_several_skipped_changes_is_listed_once(tmp_path: Path) -> None:
    own = adapter(attention(shapes_of(FAMILIES["flux"].build())["transformer"]), before="transformer.")
    foreign = adapter({"nowhere": (64, 64)}, before="transformer.")
    bias = {"transformer.nowhere.lora_B.bias": torch.ones(64)}
    path = written(tmp_path / "adapter_model.safetensors", {**own, **foreign, **bias})
    assert read("flux", path, strict=False).left == ["transformer.nowhere"]


@pytest.mark.parametrize(
    "tensors",
    [
        adapter({"nowhere.to_q": (64, 64)}, before="connectors."),
        {"connectors.x.diff": torch.ones(4)},
    ],
)
def test_an_adapter_without_any_remaining_layer_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    path = written(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(InvalidRequest, match=r"the model has none of its layers \(connectors\."):
        read("flux", path, strict=False)


def test_what_has_a_place_and_does_not_fit_is_never_left_out(tmp_path: Path) -> None:
    tensors = adapter({"proj_out": (16, 32), "nowhere": (4, 4)}, before="transformer.")
    path = written(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(InvalidRequest, match=r"transformer\.proj_out: \[16, 4\] and \[4, 32\]"):
        read("flux", path, strict=False)


def _copies(by: float = 0.0) -> tuple[Tensors, Tensors]:
    """Z-Image's fused projection as sd-scripts names it, and its parts beside it, which differ from it by so much."""
    fused = adapter({"layers_0_attention_qkv": (288, 96)}, WORDS, before="lora_unet_", alphas=(2.0,))
    down, up = (fused[f"lora_unet_layers_0_attention_qkv.{suffix}"] for suffix in WORDS)
    parts: Tensors = {}
    for name, rows in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True):
        layer = f"lora_unet_layers_0_attention_{name}"
        parts |= {f"{layer}.lora_down.weight": down.clone(), f"{layer}.lora_up.weight": rows * (1 + by)}
        parts[f"{layer}.alpha"] = torch.tensor(2.0)
    return fused, parts


def test_copies_of_a_fused_layer_count_once_with_it(tmp_path: Path) -> None:
    fused, parts = _copies()
    both = written(tmp_path / "both.safetensors", {**fused, **parts})
    alone = written(tmp_path / "fused.safetensors", fused)
    assert_same(deltas(read("zimage", both)), by_diffusers("zimage", alone))


def test_parts_that_differ_from_the_fused_layer_are_refused_with_both_names(tmp_path: Path) -> None:
    fused, parts = _copies(by=0.01)
    path = written(tmp_path / "both.safetensors", {**fused, **parts})
    with pytest.raises(InvalidRequest, match=r"it has a layer twice \(lora_unet_layers_0_attention_\w+, lora_unet"):
        read("zimage", path)


def test_sd_scripts_names_for_stable_diffusion_3_are_those_of_diffusers_converter_of_checkpoints(
    tmp_path: Path,
) -> None:
    """The model's weights get the differences that diffusers' conversion of the checkpoint's weights would get."""
    transformer = FAMILIES["sd3"].build().transformer
    config = transformer.config
    width, blocks = config.num_attention_heads * config.attention_head_dim, config.num_layers
    layers: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, config.in_channels, config.patch_size, config.patch_size),
        "context_embedder": (width, config.joint_attention_dim),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, config.pooled_projection_dim),
        "y_embedder.mlp.2": (width, width),
        "final_layer.linear": (config.patch_size**2 * config.out_channels, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for number in range(blocks):
        for stream in ("x", "context"):
            block, last = f"joint_blocks.{number}.{stream}_block", stream == "context" and number == blocks - 1
            layers[f"{block}.attn.qkv"] = (3 * width, width)
            layers[f"{block}.adaLN_modulation.1"] = ((2 if last else 6) * width, width)
            if not last:
                layers[f"{block}.attn.proj"] = (width, width)
                layers[f"{block}.mlp.fc1"], layers[f"{block}.mlp.fc2"] = (4 * width, width), (width, 4 * width)
    underscored = {layer.replace(".", "_"): shape for layer, shape in layers.items()}
    tensors = adapter(underscored, WORDS, before="lora_unet_", ranks=(4, 6), alphas=(2.0, 16.0))
    clip = adapter(CLIP, WORDS, before="lora_te1_text_model_", alphas=(4.0,))
    added = {}
    for layer, shape in layers.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        down, up = (tensors[f"{name}.{suffix}"] for suffix in WORDS)
        scale = float(tensors[f"{name}.alpha"]) / len(down)
        added[f"{layer}.weight"] = (scale * up.flatten(1) @ down.flatten(1)).view(shape)
    biases = {name.replace(".weight", ".bias"): torch.zeros(len(tensor)) for name, tensor in added.items()}
    converted = convert_sd3_transformer_checkpoint_to_diffusers({**added, **biases, "pos_embed": torch.zeros(1)})
    expected = {("transformer", n.removesuffix(".weight")): t for n, t in converted.items() if n.endswith(".weight")}
    for layer in CLIP:
        own = layer.replace("encoder_layers_0_", "encoder.layers.0.").replace("encoder_layers_1_", "encoder.layers.1.")
        own = own.replace("self_attn_", "self_attn.").replace("mlp_", "mlp.")
        prefix = "" if own in shapes_of(FAMILIES["sd3"].build())["text_encoder"] else "text_model."
        expected["text_encoder", prefix + own] = product(clip, f"lora_te1_text_model_{layer}", WORDS)
    file = read("sd3", written(tmp_path / "adapter_model.safetensors", {**tensors, **clip}))
    assert_same(deltas(file), expected)
