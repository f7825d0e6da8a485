"""Changes of whole weights are what peft merges, undone bitwise, and refused where they cannot be computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.protocol.adapters import ADAPTER_CONFIG, ADAPTER_FILE, SetAdapters, UnmergeAdapters, Use
from safelight.protocol.errors import InvalidRequest
from safelight.tests.ranks import on_ranks
from safelight.tests.tiny import FAMILIES, save
from safelight.tests.worker.lora import whole_weights
from safelight.worker.model.model import Model
from safelight.worker.parallel.ranks import ALONE

from .agreement import change, distance, draw, new_adapters, new_batcher, request
from .formats import WORDS, adapter
from .whole_weights import ATTENTION, CONVOLUTIONAL, CONVOLUTIONS, KINDS, is_merged, setting, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = save("flux", folder)
    whole_weights.references(folder / "adapters", checkpoint)
    return folder / "adapters", checkpoint


def test_one_rank_merges_what_peft_merges(directory: tuple[Path, Path]) -> None:
    whole_weights.every_kind(ALONE, *directory, False)


def test_two_ranks_merge_what_peft_merges(directory: tuple[Path, Path]) -> None:
    """Also DoRA in layers whose rows are divided, where a norm is of all ranks."""
    on_ranks(2, whole_weights.every_kind, *directory, True)


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_convolutions_are_merged_as_peft_merges_them(
    kind: str, tiny_model: Callable[[str], Model], tmp_path: Path
) -> None:
    model = tiny_model("sdxl")
    module = FAMILIES["sdxl"].build().unet
    module.load_state_dict(model.pipeline.unet.state_dict())
    expected = write(CONVOLUTIONAL[kind](CONVOLUTIONS), module, tmp_path / "x", prefix="unet.")
    adapters = new_adapters(model)
    change(adapters, setting(tmp_path / "x"))
    is_merged(model, "unet", expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_is_peft_s_scale(kind: str, tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    model = tiny_model("flux")
    module = FAMILIES["flux"].build().transformer
    module.load_state_dict(model.pipeline.transformer.state_dict())
    expected = write(KINDS[kind](ATTENTION), module, tmp_path / "x", strength=0.7)
    adapters = new_adapters(model)
    change(adapters, setting(tmp_path / "x", strength=0.7))
    is_merged(model, "transformer", expected)


def test_a_picture_with_dora_is_what_peft_draws(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    model = tiny_model("flux")
    pipeline = FAMILIES["flux"].build()
    pipeline.transformer.load_state_dict(model.pipeline.transformer.state_dict())
    before = draw(model, new_batcher(None), new_adapters(model), [request("flux", 0)])[0]
    expected = write(KINDS["DoRA"](ATTENTION), pipeline.transformer, tmp_path / "x")
    adapters = new_adapters(model)
    batcher = new_batcher(adapters)
    change(adapters, setting(tmp_path / "x"))
    drawn = draw(model, batcher, adapters, [request("flux", 0)])[0]
    change(adapters, UnmergeAdapters())
    model.pipeline.transformer.load_state_dict(expected)
    assert distance(drawn, draw(model, batcher, adapters, [request("flux", 0)])[0]) < 1e-5
    assert distance(drawn, before) > 1e-3


def test_auto_merges_what_can_only_be_merged_and_other_ways_are_refused(
    tiny_model: Callable[[str], Model], tmp_path: Path
) -> None:
    model = tiny_model("flux")
    write(KINDS["LoKr"](ATTENTION), FAMILIES["flux"].build().transformer, tmp_path / "x")
    adapters = new_adapters(model)
    for mode in ("dynamic", "request"):
        with pytest.raises(InvalidRequest, match=r"transformer\.\S+ \(LoKr\).* can only be merged"):
            adapters.prepare(setting(tmp_path / "x", mode=mode))
    change(adapters, setting(tmp_path / "x", mode="auto"))
    assert "can only be merged" in adapters.notes[0]
    assert adapters.state.active["transformer"][0].merged
    change(adapters, UnmergeAdapters())
    with pytest.raises(InvalidRequest, match=r"\(LoKr\)"):
        adapters.wanted([Use("x")])
    with pytest.raises(InvalidRequest, match=r"\(LoKr\)"):
        adapters.prepare(SetAdapters(nicknames=["x"], strengths=[1.0], mode="dynamic"))


def test_rows_that_a_converter_cuts_are_cut_of_every_kind(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    """sd-scripts fuses what diffusers has apart, and turns scale and shift around."""
    layers = {"double_blocks_0_img_attn_qkv": (192, 64), "final_layer_adaLN_modulation_1": (128, 64)}
    generator = torch.Generator().manual_seed(3)
    tensors, products = {}, {}
    for layer, (out, inputs) in layers.items():
        w1, w2 = (torch.randn(*shape, generator=generator) for shape in ((8, 4), (out // 8, inputs // 4)))
        tensors |= {f"lora_unet_{layer}.lokr_w1": w1, f"lora_unet_{layer}.lokr_w2": w2}
        products[layer] = torch.kron(w1, w2)
    model = tiny_model("flux")
    base = model.pipeline.transformer.state_dict()
    expected = {name: tensor.clone() for name, tensor in base.items()}
    thirds = products["double_blocks_0_img_attn_qkv"].chunk(3)
    for name, part in zip(("to_q", "to_k", "to_v"), thirds, strict=True):
        expected[f"transformer_blocks.0.attn.{name}.weight"] += part
    shift, scale = products["final_layer_adaLN_modulation_1"].chunk(2)
    expected["norm_out.linear.weight"] += torch.cat([scale, shift])
    (tmp_path / "x").mkdir()
    save_file(tensors, tmp_path / "x" / ADAPTER_FILE)
    change(new_adapters(model), setting(tmp_path / "x"))
    is_merged(model, "transformer", expected)


WAN_DIFFERENCES = {
    "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "blocks.0.cross_attn.norm_k.diff": "blocks.0.attn2.norm_k.weight",
    "blocks.1.norm3.diff": "blocks.1.norm2.weight",
    "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
    "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    "blocks.1.cross_attn.o.diff_b": "blocks.1.attn2.to_out.0.bias",
    "blocks.0.ffn.0.diff_b": "blocks.0.ffn.net.0.proj.bias",
    "blocks.0.ffn.2.diff_b": "blocks.0.ffn.net.2.bias",
    "time_embedding.0.diff_b": "condition_embedder.time_embedder.linear_1.bias",
    "text_embedding.2.diff_b": "condition_embedder.text_embedder.linear_2.bias",
    "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    "head.head.diff": "proj_out.weight",
    "head.head.diff_b": "proj_out.bias",
    "patch_embedding.diff_b": "patch_embedding.bias",
}
"""Tensors besides pairs in files that distil Wan, and diffusers' tensors for them."""


def test_differences_of_biases_and_norms_are_added_together_with_pairs(
    tiny_model: Callable[[str], Model], tmp_path: Path
) -> None:
    model = tiny_model("wan")
    expected = {name: tensor.clone() for name, tensor in model.pipeline.transformer.state_dict().items()}
    pairs = adapter({"blocks.0.self_attn.q": (64, 64)}, WORDS, before="diffusion_model.")
    tensors = dict(pairs)
    for number, (name, own) in enumerate(WAN_DIFFERENCES.items()):
        torch.manual_seed(number)
        tensors[f"diffusion_model.{name}"] = torch.randn_like(expected[own])
        expected[own] += 0.5 * tensors[f"diffusion_model.{name}"]
    down, up = (pairs[f"diffusion_model.blocks.0.self_attn.q.{suffix}"] for suffix in WORDS)
    expected["blocks.0.attn1.to_q.weight"] += 0.5 * up @ down
    (tmp_path / "x").mkdir()
    save_file(tensors, tmp_path / "x" / ADAPTER_FILE)
    adapters = new_adapters(model)
    before = {name: tensor.clone() for name, tensor in model.pipeline.transformer.state_dict().items()}
    change(adapters, setting(tmp_path / "x", strength=0.5))
    is_merged(model, "transformer", expected)
    change(adapters, UnmergeAdapters())
    assert all(torch.equal(one, before[name]) for name, one in model.pipeline.transformer.state_dict().items())


BROKEN = {
    "LoKr without its second factor": (
        {"transformer.proj_out.lokr_w1": torch.ones(4, 4)},
        r"not all factors of LoKr, or too many \(transformer\.proj_out: w1\)",
    ),
    "LoHa with one core": (
        {f"transformer.proj_out.hada_{name}": torch.ones(4, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1")},
        "not all factors of LoHa",
    ),
    "factors that do not fit each other": (
        {f"transformer.proj_out.hada_{name}": torch.ones(4, 3) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        "the factors of a LoHa do not fit each other",
    ),
    "another shape": (
        {"transformer.proj_out.lokr_w1": torch.ones(4, 4), "transformer.proj_out.lokr_w2": torch.ones(4, 4)},
        r"proj_out: a LoKr of \[16, 16\], for a weight of \[16, 64\]",
    ),
    "a magnitude alone": (
        {"transformer.proj_out.lora_magnitude_vector": torch.ones(16)},
        "magnitudes of DoRA have no pair",
    ),
    "magnitudes of inputs": (
        {
            **adapter({"proj_out": (16, 64)}, before="transformer."),
            "transformer.proj_out.dora_scale": torch.ones(1, 64),
        },
        "is not of outputs",
    ),
    "too few magnitudes": (
        {
            **adapter({"proj_out": (16, 64)}, before="transformer."),
            "transformer.proj_out.lora_magnitude_vector": torch.ones(8),
        },
        "16 outputs and 8 magnitudes",
    ),
    "a bias that the layer has not": (
        {"transformer.transformer_blocks.0.attn.norm_q.diff_b": torch.ones(16)},
        r"it changes the bias of transformer\.transformer_blocks\.0\.attn\.norm_q, and it has none",
    ),
    "an unknown layer": (
        {"transformer.nowhere.diff": torch.ones(16)},
        r"1 layers that the model does not have.*nowhere",
    ),
    "not finite": (
        {"transformer.proj_out.diff_b": torch.full((16,), float("nan"))},
        r"infinite.*proj_out \(difference\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_change_that_cannot_be_computed_is_refused_by_name(
    case: str, tiny_model: Callable[[str], Model], tmp_path: Path
) -> None:
    tensors, message = BROKEN[case]
    (tmp_path / "x").mkdir()
    save_file(tensors, tmp_path / "x" / ADAPTER_FILE)
    adapters = new_adapters(tiny_model("flux"))
    with pytest.raises(InvalidRequest, match=message):
        adapters.prepare(setting(tmp_path / "x"))


def test_a_configuration_of_another_kind_than_the_file_is_refused(
    tiny_model: Callable[[str], Model], tmp_path: Path
) -> None:
    """An adapter that says DoRA and has lost its magnitudes would be another one."""
    write(KINDS["DoRA"](ATTENTION), FAMILIES["flux"].build().transformer, tmp_path / "x")
    tensors = load_file(tmp_path / "x" / ADAPTER_FILE)
    save_file({n: t for n, t in tensors.items() if "magnitude" not in n}, tmp_path / "x" / ADAPTER_FILE)
    assert json.loads((tmp_path / "x" / ADAPTER_CONFIG).read_text())["use_dora"]
    with pytest.raises(InvalidRequest, match=r"adapter_config\.json is of DoRA, and the file has none"):
        new_adapters(tiny_model("flux")).prepare(setting(tmp_path / "x"))


def test_lycoris_applies_no_alpha_where_neither_factor_is_decomposed(
    tiny_model: Callable[[str], Model], tmp_path: Path
) -> None:
    """LyCORIS writes an alpha there too; there is no rank that it could be divided by."""
    model = tiny_model("flux")
    w1, w2 = torch.randn(4, 8), torch.randn(4, 8)
    name = "transformer.proj_out"
    tensors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(1e9)}
    expected = {one: tensor.clone() for one, tensor in model.pipeline.transformer.state_dict().items()}
    expected["proj_out.weight"] += torch.kron(w1, w2)
    (tmp_path / "x").mkdir()
    save_file(tensors, tmp_path / "x" / ADAPTER_FILE)
    change(new_adapters(model), setting(tmp_path / "x"))
    is_merged(model, "transformer", expected)
