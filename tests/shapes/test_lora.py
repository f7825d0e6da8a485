"""Training an adapter lowers its loss, goes on where it stopped, and writes what diffusers loads."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from torch import Tensor

from safelight.shapes.styles import STYLES
from safelight.shapes.train import lora
from safelight.shapes.train.flow import Batch, draw_batch, flow_loss, tokenize
from safelight.shapes.train.latents import Latents, encode_scenes
from safelight.shapes.train.model import TextToVelocity
from safelight.shapes.train.run import Run

TOKENS = 6 * (64 + 16)


def embedded() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(lora.CHECKPOINT)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_in(folder: Path) -> Run:
    return Run(folder, torch.device("cpu"), 0)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    return encode_scenes(run_in(tmp_path_factory.mktemp("latents")), embedded().vae, 24, ("outlined",))


@torch.no_grad()
def loss(pipeline: FluxPipeline, batch: Batch) -> float:
    """The loss of one batch, always with the same noise."""
    model = TextToVelocity(pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    texts = [caption.text for caption in batch.captions]
    ids = tokenize(pipeline.tokenizer, pipeline.tokenizer_2, texts, batch.length)
    return float(flow_loss(model, batch, ids, torch.Generator().manual_seed(1), torch.device("cpu"))[0])


def adapter_of(pipeline: FluxPipeline) -> list[Tensor]:
    return [weight.detach().clone() for name, weight in pipeline.transformer.named_parameters() if "lora_" in name]


def test_styled_latents_are_not_normalised_otherwise_than_the_model_s(latents: Latents) -> None:
    config = embedded().vae.config
    assert (latents.shift, latents.scale) == (config.shift_factor, config.scaling_factor)
    assert latents.tokens.shape == (24, 64, 64)


def test_training_does_not_leave_the_loss_where_it_was_nor_touch_the_model(latents: Latents, tmp_path: Path) -> None:
    pipeline, plain = embedded(), embedded()
    batch = draw_batch(latents, torch.Generator().manual_seed(0), 2 * TOKENS)
    before = loss(pipeline, batch)
    lora.train(run_in(tmp_path), pipeline, {("outlined",): latents}, 16, 4, TOKENS)
    assert loss(pipeline, batch) < 0.9 * before
    pipeline.disable_lora()
    assert loss(pipeline, batch) == before == loss(plain, batch)


def test_an_interruption_does_not_change_the_adapter(
    latents: Latents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "CHECKPOINT_EVERY", 1)
    whole, broken, resumed = embedded(), embedded(), embedded()
    both = dict.fromkeys(lora.together(STYLES), latents)
    lora.train(run_in(tmp_path / "whole"), whole, both, 4, 2, TOKENS)
    calls = itertools.count()

    def interrupted(*arguments: object) -> tuple[Tensor, Tensor]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return flow_loss(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(lora, "flow_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lora.train(run_in(tmp_path / "broken"), broken, both, 4, 2, TOKENS)
    lora.train(run_in(tmp_path / "broken"), resumed, both, 4, 2, TOKENS)
    assert all(torch.equal(*pair) for pair in zip(adapter_of(whole), adapter_of(resumed), strict=True))
    assert not all(torch.equal(*pair) for pair in zip(adapter_of(whole), adapter_of(broken), strict=True))


def test_the_command_does_not_write_what_diffusers_cannot_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--style", *STYLES, "--out", str(tmp_path), "--steps", "3", "--scenes", "60", "--rank", "2"]
    monkeypatch.setattr(sys, "argv", ["lora", *settings, "--device", "cpu"])
    lora.main()
    pipeline = embedded()
    for style in STYLES:
        path = tmp_path / style / "pytorch_lora_weights.safetensors"
        with safe_open(path, "pt") as file:
            assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
            assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in file.keys()  # noqa: SIM118
            assert "lora_adapter_metadata" in file.metadata()
        pipeline.load_lora_weights(path, adapter_name=style)
        config = pipeline.transformer.peft_config[style]
        assert (config.r, config.lora_alpha, set(config.target_modules)) == (2, 2, set(lora.TARGETS))
    pipeline.set_adapters(list(STYLES), [1.0, 0.7])
    picture = pipeline("a red circle", height=128, width=128, num_inference_steps=1, max_sequence_length=32).images[0]
    assert picture.size == (128, 128)


def test_an_adapter_that_is_off_does_not_learn() -> None:
    pipeline = embedded()
    lora.add_adapters(pipeline, STYLES, 2, 0)
    lora.use(pipeline, ["outlined"])
    learning = {name for name, weight in pipeline.transformer.named_parameters() if weight.requires_grad}
    assert learning == {
        name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name and "outlined" in name
    }
