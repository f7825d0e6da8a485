"""The blocks of a model are found by what diffusers declares or by structure, through every wrapper."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel
from torch import nn
from transformers import PreTrainedModel

from safelight.benchmarks.coverage.catalogue import exported
from safelight.benchmarks.coverage.encoders import ENCODERS
from safelight.benchmarks.coverage.parts import MODELS
from safelight.benchmarks.coverage.tokenizing import TOKENIZERS
from safelight.tests.effort import chosen
from safelight.worker.compiling.block import CompilableBlock
from safelight.worker.crossing.overlay import put_overlay
from safelight.worker.graphs.block import GraphedBlock
from safelight.worker.internals.blocks import NoBlocks, RepeatedBlocks, repeated_blocks
from safelight.worker.lora.layers import LayerLora, adaptable_layers, swap_in
from safelight.worker.lora.rows import ActiveRows
from safelight.worker.pipelines.components import DENOISERS

ABSTRACT = {"PreTrainedModel", "GemmaPreTrainedModel", "Gemma2PreTrainedModel", "T5GemmaEncoderModel"}
"""Annotations of constructors that name no class which can be made; the classes meant are named elsewhere."""

LARGER: dict[str, dict[str, Any]] = {
    "LatteTransformer3DModel": {"num_layers": 2},  # one by default
    "Transformer2DModel": {"in_channels": 32, "num_layers": 2},
    "UniDiffuserModel": {"sample_size": 8, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 5},
}

Found = dict[str, tuple[int, str]]


def found(model: nn.Module) -> Found:
    """The number of blocks and the first one's name, by class."""
    return {group.cls.__name__: (len(group.modules), next(iter(group.modules))) for group in repeated_blocks(model)}


def flux(double: int = 2, single: int = 3) -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(
            **MODELS["FluxTransformer2DModel"] | {"num_layers": double, "num_single_layers": single}
        )


FLUX: Found = {
    "FluxTransformerBlock": (2, "transformer_blocks.0"),
    "FluxSingleTransformerBlock": (3, "single_transformer_blocks.0"),
}


def qwen3_omni() -> PreTrainedModel:
    text = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "vocab_size": 64}
    thinker = {
        "text_config": text,
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
        "audio_config": {"encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
    }
    config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    return transformers.Qwen3OmniMoeForConditionalGeneration(config)


def encoder(name: str) -> Callable[[], nn.Module]:
    return lambda: ENCODERS[name](TOKENIZERS["Qwen2Tokenizer"]())


SEEING: dict[str, tuple[Callable[[], nn.Module], str, int, str]] = {
    "qwen2.5-vl": (
        encoder("Qwen2_5_VLForConditionalGeneration"), "Qwen2_5_VLDecoderLayer", 3, "model.language_model.layers.0"
    ),
    "qwen3-vl": (
        encoder("Qwen3VLForConditionalGeneration"), "Qwen3VLTextDecoderLayer", 2, "model.language_model.layers.0"
    ),
    "qwen3-vl without a head": (encoder("Qwen3VLModel"), "Qwen3VLTextDecoderLayer", 2, "language_model.layers.0"),
    "qwen3-omni": (qwen3_omni, "Qwen3OmniMoeThinkerTextDecoderLayer", 3, "thinker.model.language_model.layers.0"),
    "llava": (encoder("LlavaForConditionalGeneration"), "LlamaDecoderLayer", 3, "model.language_model.layers.0"),
    "qwen3": (encoder("Qwen3ForCausalLM"), "Qwen3DecoderLayer", 27, "model.layers.0"),
}  # fmt: skip
"""Language models with their decoder layers: the class, the number and the first one's name."""


@pytest.mark.parametrize("name", SEEING)
def test_a_language_model_s_layers_are_found_below_its_wrappers(name: str) -> None:
    make, cls, number, first = SEEING[name]
    with torch.device("meta"):
        model = make()
    assert found(model)[cls] == (number, first)


def test_a_declared_class_is_found_where_the_model_has_a_single_block_of_it() -> None:
    assert found(flux(1, 1)) == {cls: (1, name) for cls, (_, name) in FLUX.items()}


def test_blocks_keep_their_names_and_modules_when_the_model_is_compiled_or_adapted() -> None:
    model = flux()
    before = blocks_by_name(model)
    for path, layer in adaptable_layers(model):
        swap_in(layer, LayerLora(ActiveRows(), [path]))
    model.single_transformer_blocks[1] = torch.compile(model.single_transformer_blocks[1])  # type: ignore[assignment]
    model.transformer_blocks[0].compile()
    compiled = torch.compile(model)
    assert found(compiled) == FLUX  # type: ignore[arg-type]
    after = blocks_by_name(compiled)  # type: ignore[arg-type]
    assert list(after) == list(before)
    assert all(after[name] is block for name, block in before.items())
    assert all(compiled.get_submodule(name) is not None for name in after)  # type: ignore[attr-defined]


def test_overlays_do_not_hide_a_block_s_class() -> None:
    model = flux()
    put_overlay(GraphedBlock, model.transformer_blocks[1], None)
    put_overlay(CompilableBlock, model.transformer_blocks[1], None)
    assert found(model) == FLUX


def blocks_by_name(model: nn.Module) -> dict[str, nn.Module]:
    return {name: block for group in repeated_blocks(model) for name, block in group.modules.items()}


def test_no_block_contains_another_one() -> None:
    with torch.device("meta"):
        model = diffusers.UNet3DConditionModel(**MODELS["UNet3DConditionModel"])
    blocks = blocks_by_name(model)
    assert not [name for name in blocks for other in blocks if name.startswith(f"{other}.")]


def test_the_parts_of_a_single_block_are_not_taken_for_blocks() -> None:
    with torch.device("meta"):
        model = diffusers.LatteTransformer3DModel(**MODELS["LatteTransformer3DModel"] | {"num_layers": 1})
    with pytest.raises(NoBlocks, match=r"transformer_blocks \(1 BasicTransformerBlock\)"):
        repeated_blocks(model)


def test_a_model_without_blocks_is_refused_with_what_was_looked_at() -> None:
    different = nn.ModuleList([nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(3, 4))])
    model = nn.Module()
    model.levels = different
    with pytest.raises(NoBlocks, match=r"Module has no repeated blocks.*levels \(2 Sequential\)"):
        repeated_blocks(model)


# every denoiser and text encoder that a pipeline of diffusers takes


def _classes(annotation: Any) -> Iterator[type[nn.Module]]:
    for one in (annotation, *typing.get_args(annotation)):
        if isinstance(one, type) and issubclass(one, nn.Module):
            yield one


def _taken(pipeline: str) -> Iterator[type[nn.Module]]:
    """The classes of the denoisers and text encoders in the signature of ``pipeline``."""
    cls = getattr(diffusers, pipeline)
    for name, annotation in typing.get_type_hints(cls.__init__).items():
        if name in DENOISERS or name.startswith("text_encoder"):
            yield from _classes(annotation)


def _every_class() -> list[type[nn.Module]]:
    classes = {cls for pipeline in exported() for cls in _taken(pipeline)}
    return sorted((cls for cls in classes if cls.__name__ not in ABSTRACT), key=lambda cls: cls.__name__)


def _made(cls: type[nn.Module]) -> nn.Module:
    """The class's default size, or its tiny form where it has no default."""
    with torch.device("meta"):
        try:
            return cls(cls.config_class()) if issubclass(cls, PreTrainedModel) else cls()
        except (TypeError, ValueError, AttributeError, AssertionError):
            if cls.__name__ in ENCODERS:
                return ENCODERS[cls.__name__](TOKENIZERS["Qwen2Tokenizer"]())
            form = {name: value for name, value in MODELS.get(cls.__name__, {}).items() if "layers" not in name}
            return cls(**form | LARGER.get(cls.__name__, {}))


def share(model: nn.Module, groups: tuple[RepeatedBlocks, ...]) -> float:
    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return sum(size(block) for group in groups for block in group.modules.values()) / size(model)


@pytest.mark.parametrize("name", chosen("SD3Transformer2DModel", "UNet2DConditionModel", nightly=["every class"]))
def test_every_denoiser_and_text_encoder_has_blocks(name: str) -> None:
    for cls in [getattr(diffusers, name)] if name != "every class" else _every_class():
        model = _made(cls)
        groups = repeated_blocks(model)
        if isinstance(model, PreTrainedModel):
            config = model.config.get_text_config().to_dict()
            layers = {config.get(name) for name in ("num_hidden_layers", "num_layers")}
            assert layers & {len(group.modules) for group in groups}, cls
        elif not cls._repeated_blocks:  # type: ignore[attr-defined]
            assert share(model, groups) > 0.3, cls
        else:
            compiled = {type(part).__name__ for part in model.modules()} & set(cls._repeated_blocks)  # type: ignore[attr-defined]
            assert {group.cls.__name__ for group in groups} <= compiled, cls
