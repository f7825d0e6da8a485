"""Factors are the adapter's own and fit a divided and fused model; reading them leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.utils import logging as diffusers_logging
from torch import nn

from safelight.tests.tiny import FAMILIES, save
from safelight.worker.lora.files import load_adapter, read_adapter, weight_shapes
from safelight.worker.parallel.ranks import Ranks
from safelight.worker.weights.checkpoint.fuse import FusedPart
from safelight.worker.weights.checkpoint.loader import load_component

from ..reading_back import CPU, planned
from .formats import LETTERS, WORDS, Tensors, adapter, attention, kohya_flux, product, some
from .plain import assert_same, deltas, read, shapes_of, written


@pytest.fixture(scope="module")
def flux() -> DiffusionPipeline:
    return FAMILIES["flux"].build()


LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = {"transformer_blocks.0.attn.to_q": (64, 64), "transformer_blocks.0.ff.net.2": (64, 256)}

MAKERS: list[Callable[[], Tensors]] = [lambda: adapter(LAYERS), lambda: kohya_flux((4,), (2.5,))]


@pytest.mark.parametrize("make", MAKERS, ids=["peft", "kohya"])
def test_the_given_tensors_stay_as_they_are_and_are_not_kept(make: Callable[[], Tensors], flux: FluxPipeline) -> None:
    tensors, untouched = make(), make()
    pairs = [p for found in read_adapter(tensors, None, flux, shapes_of(flux)).layers.values() for p in found.values()]
    assert {type(factor) for pair in pairs for factor in (pair.down, pair.up)} == {torch.Tensor}
    copies = [(pair.up.clone(), pair.down.clone()) for pair in pairs]
    for name, tensor in tensors.items():
        assert torch.equal(tensor, untouched[name])
        tensor.zero_()
    assert all(torch.equal(p.up, up) and torch.equal(p.down, down) for p, (up, down) in zip(pairs, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_factors_of_every_dtype_are_computed_with_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in adapter(LAYERS, before="transformer.").items()}
    file = read("flux", written(tmp_path / "adapter_model.safetensors", tensors))
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    assert_same(deltas(file), {("transformer", layer): product(wide, f"transformer.{layer}") for layer in LAYERS}, 0)
    assert {factor.dtype for p in file.layers["transformer"].values() for factor in (p.up, p.down)} == {torch.float32}
    assert file.nbytes == 4 * sum(tensor.numel() for tensor in tensors.values())


def test_alphas_are_not_rounded_to_the_dtype_of_the_factors(tmp_path: Path) -> None:
    """A converter multiplies them into bfloat16; the file's own third of the rank is not in bfloat16."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in kohya_flux((6,), ()).items()}
    alphas = {name.replace("lora_up.weight", "alpha"): torch.tensor(1.3) for name in tensors if "lora_up" in name}
    file = read("flux", written(tmp_path / "adapter_model.safetensors", {**tensors, **alphas}))
    pair = file.layers["transformer"]["transformer_blocks.0.attn.to_out.0"]
    assert pair.scale == pytest.approx(1.3 / 6, rel=1e-7)
    assert torch.equal(pair.down, tensors["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"].float())


def test_converters_are_quiet_and_leave_the_log_as_it_was(
    flux: DiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    empty = adapter({"lora_te1_text_projection": (32, 32)}, WORDS)
    tensors = {**kohya_flux((4,), (4.0,)), **{name: tensor.zero_() for name, tensor in empty.items()}}
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_info()
    try:
        FluxPipeline.lora_state_dict(dict(tensors))
        assert "text_projection" in caplog.text
        caplog.clear()
        read_adapter(tensors, None, flux, shapes_of(flux))
        assert diffusers_logging.get_verbosity() == diffusers_logging.INFO
    finally:
        diffusers_logging.set_verbosity(before)
    assert not caplog.records


@pytest.mark.parametrize(("size", "fused"), [(1, True), (2, False), (2, True)])
@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "qwenimage", "zimage"])
def test_a_model_that_is_divided_and_fused_has_its_whole_shapes(
    name: str, size: int, fused: bool, tmp_path: Path
) -> None:
    checkpoint = save(name, tmp_path)
    pipeline = FAMILIES[name].build()
    layouts = {}
    for component, (cls, family) in planned(checkpoint).items():
        ranks, folder = Ranks(rank=0, size=size), checkpoint / component
        loaded = load_component(cls, folder, dtype=torch.float32, device=CPU, family=family, ranks=ranks, fused=fused)
        layouts[component] = loaded.layout
        pipeline.register_modules(**{component: loaded.module})
    shapes = weight_shapes(layouts)
    plain = FAMILIES[name].build()
    whole = shapes_of(plain)
    for component, found in shapes.items():
        assert found.items() <= whole[component].items()
        assert found.keys() >= {n for n, m in plain.components[component].named_modules() if isinstance(m, LINEAR)}
    assert any(isinstance(part, FusedPart) for part in pipeline.transformer.modules()) == fused
    linear = {layer: shape for layer, shape in whole["transformer"].items() if len(shape) == 2}
    tensors = adapter(attention(linear), before="transformer.")
    path = written(tmp_path / "adapter_model.safetensors", tensors)
    assert_same(deltas(load_adapter(tmp_path, pipeline, shapes)), deltas(read(name, path)), 0)


def test_the_four_layers_that_flux_has_fused_in_one_are_kept_apart(flux: FluxPipeline) -> None:
    """At the full width, as the converter knows no other."""
    width = 3072
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    heights = (width, width, width, 4 * width)
    shapes = {f"single_transformer_blocks.0.{n}": (h, width) for n, h in zip(names, heights, strict=True)}
    tensors = adapter(
        {"single_blocks_0_linear1": (7 * width, width)}, WORDS, before="lora_unet_", ranks=(2,), alphas=(3,)
    )
    file = read_adapter(tensors, None, flux, {"transformer": shapes})
    ups = [pair.up for pair in file.layers["transformer"].values()]
    assert list(file.layers["transformer"]) == list(shapes)
    assert torch.equal(torch.cat(ups), tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"])
    assert {pair.scale for pair in file.layers["transformer"].values()} == {1.5}


def test_both_denoisers_of_wan_can_be_named(tmp_path: Path) -> None:
    """Factors for "transformer" alone are returned as such; the caller chooses."""
    layers = {"blocks.0.attn1.to_q": (64, 64)}
    tensors = {**adapter(layers, before="transformer."), **adapter(layers, before="transformer_2.", ranks=(2,))}
    file = read("wan22", written(tmp_path / "adapter_model.safetensors", tensors))
    assert {name: pair.rank for name, found in file.layers.items() for pair in found.values()} == {
        "transformer": 4,
        "transformer_2": 2,
    }


def test_peft_is_not_needed() -> None:
    """It is a tool of the tests."""
    code = """
import sys
sys.modules["peft"] = None
import safelight.worker.lora.files
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_kind_of_suffix_means_the_same(flux: DiffusionPipeline) -> None:
    shapes = shapes_of(flux)
    layers = some(shapes["transformer"], "to_q")
    suffixes = (
        LETTERS,
        WORDS,
        ("lora.down.weight", "lora.up.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
    )
    found = [deltas(read_adapter(adapter(layers, kind), None, flux, shapes)) for kind in suffixes]
    for other in found[1:]:
        assert_same(other, found[0], 0)
