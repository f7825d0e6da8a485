"""Which alpha applies to a layer, and that it is never rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from safelight.tests.tiny import FAMILIES

from .formats import Tensors, adapter, kohya_flux, kohya_sdxl, musubi_wan
from .plain import assert_same, by_diffusers, deltas, of_layers, read, written

TARGETS = r"transformer_blocks\.0\.(attn\.(to_q|to_k|add_q_proj)|ff\.net\.2)"
LAYERS = {
    "transformer_blocks.0.attn.to_q": (64, 64),
    "transformer_blocks.0.attn.to_k": (64, 64),
    "transformer_blocks.0.ff.net.2": (64, 256),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "below the rank": {"r": 8, "lora_alpha": 2},
    "above the rank": {"r": 4, "lora_alpha": 32},
    "no integer": {"r": 4, "lora_alpha": 5.3},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True},
    "rank_pattern": {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2, r"^transformer_blocks.*ff\.net\.2": 7}},
    "alpha_pattern": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"attn.to_k": 1.5, r".*\.add_q_proj": 9}},
    "all of it": {
        "r": 4, "lora_alpha": 6.25, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 0.7}, "use_rslora": True,
    },
}  # fmt: skip


def with_random_ups(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def config(**options: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **options}


def folder(path: Path, tensors: Tensors, told: dict[str, Any]) -> Path:
    written(path / "adapter_model.safetensors", tensors)
    (path / "adapter_config.json").write_text(json.dumps(told))
    return path


@pytest.mark.parametrize("case", OPTIONS)
def test_a_folder_that_peft_wrote_adds_what_peft_adds(case: str, tmp_path: Path) -> None:
    model = FAMILIES["flux"].build().transformer
    trained: Any = with_random_ups(get_peft_model(model, LoraConfig(target_modules=TARGETS, **OPTIONS[case])))
    trained.save_pretrained(tmp_path)
    file = read("flux", tmp_path)
    assert_same(deltas(file), of_layers({"transformer": model}))


@pytest.mark.parametrize("case", OPTIONS)
def test_a_file_that_diffusers_wrote_adds_what_its_header_says(case: str, tmp_path: Path) -> None:
    transformer: Any = FAMILIES["flux"].build().transformer
    options = LoraConfig(target_modules=TARGETS, **OPTIONS[case])
    transformer.add_adapter(options)
    with_random_ups(transformer)
    told = {name: sorted(value) if isinstance(value, set) else value for name, value in options.to_dict().items()}
    layers = get_peft_model_state_dict(transformer)
    FluxPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=told)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    file = read("flux", path)
    assert_same(deltas(file), by_diffusers("flux", path))
    assert_same(deltas(file), of_layers({"transformer": transformer}))


@pytest.mark.parametrize(
    ("name", "make"), [("flux", kohya_flux), ("wan", musubi_wan), ("sdxl", kohya_sdxl)], ids=["flux", "wan", "sdxl"]
)
def test_an_alpha_that_is_given_stands_for_those_of_the_file(name: str, make: Any, tmp_path: Path) -> None:
    """Also where a converter bakes the file's into the factors."""
    file = read(name, written(tmp_path / "own.safetensors", make((4,), (1.0, 32.0))), alpha=2.5)
    given = written(tmp_path / "given.safetensors", make((4,), (2.5,)))
    assert_same(deltas(file), by_diffusers(name, given))
    assert {pair.alpha for layers in file.layers.values() for pair in layers.values()} == {2.5}


def test_a_layers_own_alpha_stands_before_the_configurations(tmp_path: Path) -> None:
    tensors = adapter(LAYERS, alphas=(2.5,))
    del tensors["transformer_blocks.0.attn.to_k.alpha"]
    layers = read("flux", folder(tmp_path, tensors, config(lora_alpha=10))).layers["transformer"]
    assert {layer.rpartition(".")[2]: (pair.alpha, pair.scale) for layer, pair in layers.items()} == {
        "to_q": (2.5, 0.625),
        "to_k": (10, 2.5),
        "2": (2.5, 0.625),
    }


def test_the_configurations_alpha_stands_before_the_headers(tmp_path: Path) -> None:
    tensors = adapter(LAYERS, before="transformer.")
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 3.5})}
    (tmp_path / "beside").mkdir()
    written(tmp_path / "beside" / "adapter_model.safetensors", tensors, header)
    assert read("flux", tmp_path / "beside").alpha == 3.5
    (tmp_path / "beside" / "adapter_config.json").write_text(json.dumps(config(lora_alpha=7)))
    assert read("flux", tmp_path / "beside").alpha == 7
    assert read("flux", tmp_path / "beside", alpha=0.3).alpha == 0.3


def test_with_no_alpha_anywhere_the_product_is_added_as_it_is(tmp_path: Path) -> None:
    file = read("flux", written(tmp_path / "adapter_model.safetensors", adapter(LAYERS, ranks=(4, 4, 6))))
    assert {pair.scale for pair in file.layers["transformer"].values()} == {1.0}
    assert (file.rank, file.alpha) == (6, 4.0)


def test_an_alpha_is_not_rounded(tmp_path: Path) -> None:
    tensors = adapter(LAYERS, alphas=(0.75,))
    path = written(tmp_path / "adapter_model.safetensors", tensors)
    assert {pair.scale for pair in read("flux", path).layers["transformer"].values()} == {0.75 / 4}
    assert {pair.scale for pair in read("flux", path, alpha=0.1).layers["transformer"].values()} == {0.1 / 4}


def test_rank_stabilised_scales_also_hold_for_an_alpha_that_is_given(tmp_path: Path) -> None:
    file = read("flux", folder(tmp_path, adapter(LAYERS), config(use_rslora=True)), alpha=3)
    assert {pair.scale for pair in file.layers["transformer"].values()} == {1.5}


def test_each_components_header_is_its_own(tmp_path: Path) -> None:
    encoder = {"encoder.layers.0.self_attn.q_proj": (32, 32)}
    tensors = {**adapter(LAYERS, before="transformer."), **adapter(encoder, before="text_encoder.", ranks=(2,))}
    told = {"transformer.r": 4, "transformer.lora_alpha": 8, "text_encoder.r": 2, "text_encoder.lora_alpha": 1}
    header = {"lora_adapter_metadata": json.dumps(told)}
    layers = read("flux", written(tmp_path / "adapter_model.safetensors", tensors, header)).layers
    assert {component: {pair.scale for pair in found.values()} for component, found in layers.items()} == {
        "transformer": {2.0},
        "text_encoder": {0.5},
    }
