"""An adapter that cannot be applied as a whole is refused by name, in the model's own terms."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

from safelight.protocol.errors import InvalidRequest
from safelight.tests.tiny import FAMILIES
from safelight.worker.lora.files import AdapterFile, load_adapter, read_adapter

from .formats import WORDS, Tensors, adapter, kohya_flux, kohya_sdxl, xlabs_flux
from .plain import shapes_of, written

Q, K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
UP, DOWN, ALPHA = (f"transformer.{Q}.{suffix}" for suffix in ("lora_B.weight", "lora_A.weight", "alpha"))

ABSENT = "layers that the model does not have, or that cannot be converted to its names"


@pytest.fixture(scope="module")
def pipelines() -> Callable[[str], DiffusionPipeline]:
    built: dict[str, DiffusionPipeline] = {}

    def pipeline(name: str) -> DiffusionPipeline:
        if name not in built:
            built[name] = FAMILIES[name].build()
        return built[name]

    return pipeline


@pytest.fixture
def flux(pipelines: Callable[[str], DiffusionPipeline]) -> DiffusionPipeline:
    return pipelines("flux")


def good(**more: torch.Tensor) -> Tensors:
    return {**adapter({Q: (64, 64), K: (64, 64)}, before="transformer."), **more}


def config(**options: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **options}


def read(pipeline: DiffusionPipeline, tensors: Tensors, told: dict[str, Any] | None = None, **more: Any) -> AdapterFile:
    return read_adapter(tensors, told, pipeline, shapes_of(pipeline), **more)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        call()
    assert caught.value.field == "lora_path"
    return caught.value.message


def test_what_the_refusals_start_from_is_accepted(flux: DiffusionPipeline) -> None:
    file = read(flux, good(), config())
    assert set(file.layers["transformer"]) == {Q, K}
    assert file.nbytes == sum(tensor.nbytes for tensor in good().values())


NOT_APPLIED = {
    "text_encoder.token_embedding.lora_embedding_A": "embeddings",
    "lora_unet_input_blocks_1_0_in_layers_2.lora_mid.weight": "Tucker decompositions",
    "diffusion_model.head.modulation.diff_m": "differences of modulations (diff_m)",
    f"transformer.{Q}.lora_A.bias": "biases of the factors that narrow",
    f"transformer.{Q}.lora_A.default.bias": "biases of the factors that narrow",
}


@pytest.mark.parametrize("name", NOT_APPLIED)
def test_what_cannot_be_applied_is_refused_by_its_kind(name: str, flux: DiffusionPipeline) -> None:
    message = refusal(lambda: read(flux, good(**{name: torch.ones(4)})))
    expected = f"The adapter cannot be used: 1 of its tensors are of {NOT_APPLIED[name]}, which cannot be applied"
    assert message == f"{expected} ({name})."


@pytest.mark.parametrize(
    "name",
    ["transformer.proj_out.weight", "transformer.proj_out.bias", "transformer.oft_blocks", "lora_A", "x.lora_C.weight"],
)
def test_a_tensor_of_no_known_name_is_refused(name: str, flux: DiffusionPipeline) -> None:
    message = refusal(lambda: read(flux, good(**{name: torch.ones(4, 4)})))
    assert message == f"The adapter cannot be used: 1 of its tensors are not low-rank factors ({name})."


def test_integers_cannot_be_factors(flux: DiffusionPipeline) -> None:
    message = refusal(lambda: read(flux, good(**{UP: torch.ones(64, 4, dtype=torch.int8)})))
    assert f"1 of its tensors are not low-rank factors ({UP})" in message


BROKEN: dict[str, tuple[Tensors, str]] = {
    "nothing": ({}, "it has no pairs of low-rank factors."),
    "alphas alone": ({ALPHA: torch.tensor(1.0)}, f"no pairs of low-rank factors ({ALPHA})"),
    "no up": ({DOWN: torch.ones(4, 64)}, f"1 factors have no counterpart ({DOWN})"),
    "no down": ({UP: torch.ones(64, 4)}, f"1 factors have no counterpart ({UP})"),
    "an alpha of no layer": (
        good(**{"transformer.x.alpha": torch.tensor(1.0)}),
        "1 alphas are of no layer (transformer.x.alpha)",
    ),
    "an alpha of nought": (good(**{ALPHA: torch.tensor(0.0)}), f"an alpha is not a positive number ({ALPHA})"),
    "an alpha below nought": (good(**{ALPHA: torch.tensor(-1)}), "an alpha is not a positive number"),
    "an alpha that is nan": (good(**{ALPHA: torch.tensor(float("nan"))}), "an alpha is not a positive number"),
    "two alphas": (good(**{ALPHA: torch.ones(2)}), "an alpha is not a positive number"),
    "other ranks": (
        good(**{UP: torch.ones(64, 5)}),
        f"1 pairs do not fit each other (transformer.{Q}: [64, 5] and [4, 64])",
    ),
    "a vector": (good(**{UP: torch.ones(64)}), "1 pairs do not fit each other"),
    "no rank": (good(**{UP: torch.ones(64, 0), DOWN: torch.ones(0, 64)}), "1 pairs do not fit each other"),
    "nan": (
        good(**{UP: torch.full((64, 4), float("nan"))}),
        f"1 layers have infinite values or NaN (transformer.{Q})",
    ),
    "infinite": (
        good(**{DOWN: torch.full((4, 64), float("inf"), dtype=torch.bfloat16)}),
        "1 layers have infinite values or NaN",
    ),
    "twice": (good(**{UP.replace("B", "B.default"): torch.ones(64, 4)}), f"it has a factor twice ({UP}, transformer."),
    "a layer twice": (good(**adapter({Q: (64, 64)})), f"it has a layer twice (transformer.{Q}, {Q})"),
    "too wide": (
        good(**adapter({K: (64, 32)}, before="transformer.")),
        f"1 of its layers do not fit the model's (transformer.{K}: [64, 4] and [4, 32], for a weight of [64, 64])",
    ),
    "too high": (good(**adapter({K: (192, 64)}, before="transformer.")), "1 of its layers do not fit the model's"),
    "a convolution for a linear layer": (
        good(**adapter({K: (64, 64, 1, 1)}, before="transformer.")),
        "1 of its layers do not fit the model's",
    ),
    "an embedding": (
        good(**adapter({"shared": (1, 1)}, before="text_encoder_2.")),
        "1 of its layers do not fit the model's (text_encoder_2.shared: it is neither linear nor a convolution",
    ),
    "a norm": (
        good(**adapter({"transformer_blocks.0.attn.norm_q": (16, 16)}, before="transformer.")),
        "norm_q: it is neither linear nor a convolution without groups)",
    ),
    "an unknown layer": (
        good(**adapter({"transformer_blocks.7.attn.to_q": (64, 64)}, before="transformer.")),
        f"it has 1 {ABSENT} (transformer.transformer_blocks.7.attn.to_q)",
    ),
    "an unknown component": (
        good(**adapter({"mid_block.proj": (64, 64)}, before="unet.")),
        f"1 {ABSENT} (unet.mid_block.proj)",
    ),
    "a block of a high number": (
        adapter({"blocks.99999999999.self_attn.q": (64, 64)}, before="diffusion_model."),
        "2 of its tensors are not low-rank factors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named(case: str, flux: DiffusionPipeline) -> None:
    tensors, expected = BROKEN[case]
    assert expected in refusal(lambda: read(flux, tensors))


def test_a_convolution_in_groups_is_refused(pipelines: Callable[[str], DiffusionPipeline]) -> None:
    """A factor beside it would be in groups too, and no product of matrices is what both compute."""
    layer = "transformer_blocks.0.ff.conv_depth"
    shape = shapes_of(pipelines("sana"))["transformer"][layer]
    message = refusal(lambda: read(pipelines("sana"), adapter({layer: shape}, before="transformer.")))
    assert f"(transformer.{layer}: it is neither linear nor a convolution without groups)" in message


def test_no_more_than_three_names_are_shown(flux: DiffusionPipeline) -> None:
    layers = {f"blocks.{number}.{'x' * 200}": (64, 64) for number in range(50)}
    message = refusal(lambda: read(flux, adapter(layers, before="transformer.")))
    assert "50 layers that the model does not have" in message
    assert message.count("transformer.blocks.") == 3
    assert len(message) < 600


ELSEWHERE = {
    "wan for flux": ("flux", "wan"),
    "flux for qwen": ("qwenimage", "flux"),
    "sd3 for flux": ("flux", "sd3"),
    "sdxl for sd3": ("sd3", "sdxl"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_an_adapter_for_another_model_is_refused_with_its_layers(
    case: str, pipelines: Callable[[str], DiffusionPipeline]
) -> None:
    name, other = ELSEWHERE[case]
    component = "unet" if other == "sdxl" else "transformer"
    foreign = {layer: s for layer, s in shapes_of(pipelines(other))[component].items() if len(s) == 2}
    known = shapes_of(pipelines(name))["transformer"]
    absent = next(layer for layer in foreign if layer not in known)
    message = refusal(lambda: read(pipelines(name), adapter(foreign, before=f"{component}.")))
    assert "layers that the model does not have" in message
    assert f"{component}.{absent}" in message


def test_a_naming_that_no_converter_knows_is_refused(pipelines: Callable[[str], DiffusionPipeline]) -> None:
    name = "lora_unet_strange_blocks_0_attn_qkv"
    message = refusal(lambda: read(pipelines("sd3"), adapter({name: (192, 64)}, WORDS, alphas=(4.0,))))
    assert f"1 {ABSENT} ({name})" in message


def test_a_pipeline_without_a_loader_takes_its_own_names_alone(pipelines: Callable[[str], DiffusionPipeline]) -> None:
    pipeline = pipelines("pixart")
    assert not hasattr(pipeline, "load_lora_weights")
    layer = "transformer_blocks.0.attn1.to_q"
    shape = shapes_of(pipeline)["transformer"][layer]
    for before in ("base_model.model.", "transformer.", "diffusion_model.", "base_model.model.transformer.", ""):
        assert set(read(pipeline, adapter({layer: shape}, before=before)).layers["transformer"]) == {layer}
    underscored = adapter({f"lora_unet_{layer.replace('.', '_')}": shape}, WORDS)
    assert set(read(pipeline, underscored).layers["transformer"]) == {layer}
    kohya = adapter({"lora_unet_blocks_0_attn_q": shape}, WORDS)
    assert "cannot be converted to its names (lora_unet_blocks_0_attn_q)" in refusal(lambda: read(pipeline, kohya))


LOST: dict[str, tuple[str, Callable[[], Tensors], str]] = {
    "a text projection": (
        "flux",
        lambda: {**kohya_flux((4,), (4.0,)), **adapter({"lora_te1_text_projection": (32, 32)}, WORDS)},
        "lora_te1_text_projection",
    ),
    "T5": (
        "flux",
        lambda: {**kohya_flux((4,), ()), **adapter({"text_encoders.t5xxl.transformer.shared": (32, 32)}, WORDS)},
        "text_encoders.t5xxl.transformer.shared",
    ),
    "a UNet under two names": (
        "sdxl",
        lambda: {
            **kohya_sdxl((4,), (4.0,)),
            **adapter({"lora_unet_mid_block_attentions_0_proj_in": (32, 32)}, WORDS, alphas=(4.0,)),
        },
        "lora_unet_input_blocks_0_0",
    ),
    "a modulation of FLUX.2": (
        "flux2",
        lambda: adapter(
            {"double_blocks_0_img_attn_proj": (64, 64), "final_layer_adaLN_modulation_1": (128, 64)},
            WORDS,
            before="lora_unet_",
        ),
        "lora_unet_final_layer_adaLN_modulation_1",
    ),
    "a modulation of HunyuanVideo, in the wrong order": (
        "hunyuan_video",
        lambda: adapter({"double_blocks.0.img_attn_qkv": (192, 64), "final_layer.adaLN_modulation.1": (128, 64)}),
        "transformer.norm_out.linear",
    ),
}


def test_two_ways_of_naming_one_layer_are_refused(flux: DiffusionPipeline) -> None:
    tensors = {**kohya_flux((4,), (4.0,)), **adapter({Q: (64, 64)}, WORDS, before="transformer.")}
    message = refusal(lambda: read(flux, tensors))
    assert f"it has a layer twice (transformer.{Q}, lora_unet_double_blocks_0_img_attn_qkv)" in message


@pytest.mark.parametrize("case", LOST)
def test_what_a_converter_would_leave_out_in_silence_is_refused(
    case: str, pipelines: Callable[[str], DiffusionPipeline]
) -> None:
    name, make, lost = LOST[case]
    message = refusal(lambda: read(pipelines(name), make()))
    assert f"{ABSENT} ({lost}" in message


def test_tensors_that_a_converter_drops_may_be_missing_if_they_add_nothing(flux: DiffusionPipeline) -> None:
    empty = {name: tensor.zero_() for name, tensor in adapter({"lora_te1_text_projection": (32, 32)}, WORDS).items()}
    with_it, without = read(flux, {**kohya_flux((4,), ()), **empty}), read(flux, kohya_flux((4,), ()))
    assert with_it.layers["text_encoder"].keys() == without.layers["text_encoder"].keys()
    assert with_it.layers["transformer"].keys() == without.layers["transformer"].keys()


class Fusing(FluxPipeline):
    """Has a converter that makes one layer of two."""

    @classmethod
    def lora_state_dict(cls, given: Tensors, **_: Any) -> Tensors:
        down = torch.cat([given["one.lora_down.weight"], given["two.lora_down.weight"]])
        up = torch.cat([given["one.lora_up.weight"], given["two.lora_up.weight"]], dim=1)
        return {DOWN: down, UP: up}


def test_two_layers_become_one_only_with_the_same_scale(flux: DiffusionPipeline) -> None:
    fusing = Fusing(**flux.components)
    two = {"one": (64, 64), "two": (64, 64)}
    (pair,) = read(fusing, adapter(two, WORDS, alphas=(2.0,))).layers["transformer"].values()
    assert (pair.rank, pair.scale) == (8, 0.5)
    message = refusal(lambda: read(fusing, adapter(two, WORDS, alphas=(2.0, 3.0))))
    assert "layers of different alphas or ranks are one in the model (one, two)" in message


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": (config(use_dora=True), "adapter_config.json is of DoRA, and the file has none"),
    "modules_to_save": (config(modules_to_save=["proj_out"]), "asks for what cannot be applied (modules_to_save)"),
    "bias": (config(bias="all"), "asks for what cannot be applied (bias=all)"),
    "another type": (config(peft_type="VERA"), "adapter_config.json is of 'VERA', not of LORA, LOKR, LOHA"),
    "another kind": (config(peft_type="LOHA", alpha=4), "adapter_config.json is of LoHa, and the file has none"),
    "another base": (config(init_lora_weights="pissa_niter_4"), "says init_lora_weights='pissa_niter_4'"),
    "no rank": ({"lora_alpha": 4}, "does not say r as a positive integer"),
    "a rank in words": (config(r="4"), "does not say r as a positive integer"),
    "no alpha": ({"r": 4}, "does not say lora_alpha as a positive number"),
    "an alpha in words": (config(lora_alpha="4"), "does not say lora_alpha as a positive number"),
    "an alpha that is true": (config(lora_alpha=True), "does not say lora_alpha as a positive number"),
    "an alpha of nought": (config(lora_alpha=0), "does not say lora_alpha as a positive number"),
    "an infinite alpha": (config(lora_alpha=float("inf")), "does not say lora_alpha as a positive number"),
    "rslora in words": (config(use_rslora="no"), "use_rslora as a boolean"),
    "another rank": (config(r=8), f"of 2 layers, the configuration has another rank ({Q}: 8, not 4, {K}: 8, not 4)"),
    "another rank of one": (
        config(rank_pattern={"to_k": 2}),
        f"of 1 layers, the configuration has another rank ({K}: 2, not 4)",
    ),
    "half a rank": (config(rank_pattern={"to_k": 4.5}), f"({K}: 4.5, not 4)"),
    "a list of patterns": (config(alpha_pattern=["to_q"]), "does not say alpha_pattern as an object"),
    "no pattern": (config(alpha_pattern={"to_(q": 3}), "something else than patterns in its alpha_pattern"),
    "a long pattern": (config(rank_pattern={"x" * 501: 3}), "something else than patterns in its rank_pattern"),
    "a slow pattern": (config(alpha_pattern={r"((\w+\.?)+)x": 3}), "something else than patterns in its alpha_pattern"),
    "another slow pattern": (config(alpha_pattern={".*a.*b.*c": 3}), "something else than patterns"),
    "a pattern that doubles": (config(alpha_pattern={"a?" * 60 + "a" * 60: 3}), "something else than patterns"),
    "a pattern of groups": (config(alpha_pattern={"(a|a)" * 60: 3}), "something else than patterns"),
    "many patterns": (
        config(alpha_pattern={f".*{n}": 3 for n in range(65)}),
        "more than 64 patterns in its alpha_pattern",
    ),
    "a huge alpha": (config(lora_alpha=10**400), "does not say lora_alpha as a positive number, of at most a million"),
    "a huge rank": (config(r=10**400), "does not say r as a positive integer"),
    "a pattern of words": (
        config(alpha_pattern={"to_q": "3"}),
        "does not say alpha_pattern of to_q as a positive number",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_asks_for_something_else_is_refused(case: str, flux: DiffusionPipeline) -> None:
    told, expected = CONFIGS[case]
    assert expected in refusal(lambda: read(flux, good(), told))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("{", "lora_adapter_metadata in the file's header is not JSON"),
        ("[]", "lora_adapter_metadata in the file's header is not a JSON object"),
        ('{"transformer.r": 4}', "lora_adapter_metadata in the file's header does not say lora_alpha"),
        ('{"transformer.r": 3, "transformer.lora_alpha": 3}', f"({Q}: 3, not 4, {K}: 3, not 4)"),
        (
            '{"transformer.r": 4, "transformer.lora_alpha": 3, "transformer.use_dora": true}',
            "is of DoRA, and the file has none",
        ),
    ],
)
def test_a_header_that_says_something_else_is_refused(header: str, expected: str, flux: DiffusionPipeline) -> None:
    metadata = {"lora_adapter_metadata": header}
    assert expected in refusal(lambda: read(flux, good(), metadata=metadata))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_given_is_a_positive_number(alpha: float, flux: DiffusionPipeline) -> None:
    with pytest.raises(InvalidRequest, match="is not a positive number") as caught:
        read(flux, good(), alpha=alpha)
    assert caught.value.field == "lora_alpha"


def _truncated(folder: Path) -> None:
    path = written(folder / "adapter_model.safetensors", good())
    path.write_bytes(path.read_bytes()[:-1])


def _with_metadata(folder: Path, metadata: str) -> None:
    header = f'{{"__metadata__":{metadata}}}'.encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def _with_config(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(text)
        written(folder / "adapter_model.safetensors", good())

    return write


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda folder: None, "adapter_model.safetensors"),
    "truncated": (_truncated, "The file adapter_model.safetensors cannot be used: its header describes"),
    "metadata that is a list": (lambda folder: _with_metadata(folder, "[]"), "its metadata is not a map of strings"),
    "metadata of numbers": (lambda folder: _with_metadata(folder, '{"a": 1}'), "its metadata is not a map of strings"),
    "no JSON": (_with_config("{'r': 4}"), "adapter_config.json is not JSON"),
    "no JSON object": (_with_config("4"), "adapter_config.json is not a JSON object"),
    "deep JSON": (_with_config("[" * 100_000), "adapter_config.json is not JSON"),
    "another rank": (_with_config(json.dumps(config(r=2))), "of 2 layers, the configuration has another rank"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_holds_no_adapter_is_refused(case: str, tmp_path: Path, flux: DiffusionPipeline) -> None:
    make, expected = FOLDERS[case]
    make(tmp_path)
    assert expected in refusal(lambda: load_adapter(tmp_path, flux, shapes_of(flux)))


@pytest.mark.parametrize("seed", range(20))
def test_garbled_names_are_refused_in_words(seed: int, flux: DiffusionPipeline) -> None:
    """Converters fail at them in many ways, and none comes through."""
    chance = random.Random(seed)
    tensors = chance.choice([kohya_flux((4,), (4.0,)), xlabs_flux(4), adapter({Q: (64, 64), K: (64, 64)})])
    for name in chance.sample(sorted(tensors), 2):
        tensors[name.replace(chance.choice("._0a"), chance.choice(["", "9", "_", "processor."]))] = tensors.pop(name)
    assert "cannot be used" in refusal(lambda: read(flux, tensors))
