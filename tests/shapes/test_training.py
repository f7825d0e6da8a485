"""A seed determines a training run, an interruption does not change it, and what it exports can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from safelight.shapes import sample_scenes
from safelight.shapes.captions import Caption
from safelight.shapes.train import flow, vae
from safelight.shapes.train.export import export
from safelight.shapes.train.flow import Batch, draw_batch, weights
from safelight.shapes.train.latents import Latents, encode_scenes, pack
from safelight.shapes.train.model import TextToVelocity, image_ids, new_model
from safelight.shapes.train.run import Run, one_cycle

STEPS = 3
TOKENS = 4 * (64 + 16)


def run_in(folder: Path, seed: int = 0) -> Run:
    return Run(folder, torch.device("cpu"), seed)


def tiny(seed: int = 0) -> TextToVelocity:
    return new_model(seed, layers=1, single_layers=1, heads=2)


def some_latents() -> Latents:
    generator = torch.Generator().manual_seed(0)
    scenes = tuple(sample_scenes(8, generator))
    tokens = torch.randn(8, 64, 64, generator=generator).half()
    return Latents(scenes, tokens, torch.rand(8, 64, generator=generator) > 0.8, 0.1, 0.5)


def trained(folder: Path, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(99)  # the global generator must not matter
    model = flow.train(run_in(folder, seed), some_latents(), STEPS, lambda _, __: "", tiny(seed), TOKENS)
    return model.state_dict()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_the_same_seed_does_not_train_two_different_models(tmp_path: Path) -> None:
    first = trained(tmp_path / "first")
    assert same(first, trained(tmp_path / "second"))
    assert not same(first, trained(tmp_path / "other", seed=1))


def test_an_interruption_does_not_change_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "CHECKPOINT_EVERY", 1)
    whole = trained(tmp_path / "whole")
    training = flow.FlowTraining(run_in(tmp_path / "broken"), some_latents(), STEPS, tiny(), TOKENS)
    training.step(0)
    training.save(1)
    assert same(whole, trained(tmp_path / "broken"))


def test_the_autoencoder_and_its_latents_do_not_depend_on_anything_but_the_seed(tmp_path: Path) -> None:
    shifts = []
    for name in ("first", "second"):
        run = run_in(tmp_path / name)
        latents = encode_scenes(run, vae.train(run, 2, widths=(8, 8, 8, 8)), 5)
        assert latents.tokens.shape == (5, 64, 64)
        assert float(latents.tokens.float().std()) == pytest.approx(1.0, abs=0.02)
        shifts.append((latents.shift, latents.scale))
        assert encode_scenes(run, vae.new_autoencoder((8, 8, 8, 8)), 5).shift == latents.shift  # the stored ones
    assert shifts[0] == shifts[1]


def test_an_exported_model_does_not_depend_on_this_package(tmp_path: Path) -> None:
    autoencoder = vae.new_autoencoder((8, 8, 8, 8))
    export(autoencoder, tiny(), some_latents(), tmp_path, torch.float32)
    pipeline = FluxPipeline.from_pretrained(tmp_path)
    assert pipeline.vae.config.shift_factor == 0.1
    assert pipeline.vae.config.scaling_factor == 0.5
    assert pipeline.vae.config.sample_size == 128
    assert pipeline("a red circle", height=128, width=128, num_inference_steps=1).images[0].size == (128, 128)


def test_training_does_not_see_tokens_in_another_order_than_the_pipeline() -> None:
    expected = FluxPipeline._prepare_latent_image_ids(1, 8, 8, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(torch.device("cpu")), expected)
    latents = torch.randn(2, 16, 16, 16)
    assert torch.equal(FluxPipeline._unpack_latents(pack(latents), 128, 128, 8), latents)


def test_a_long_text_does_not_make_a_step_larger() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [draw_batch(some_latents(), generator) for _ in range(150)]
    assert {batch.length for batch in batches} >= {16, 32}
    assert all(len(batch.clean) * (64 + batch.length) <= flow.TOKENS for batch in batches)


def test_weights_favour_no_outcome_where_the_caption_leaves_it_open() -> None:
    shown = torch.zeros(2, 64, dtype=torch.bool)
    shown[:, :4] = True
    batch = Batch(torch.zeros(2, 64, 64), shown, (Caption("full", places=True), Caption("open", places=False)), 16)
    full, left_open = weights(batch)
    assert float(full[:4].sum()) == pytest.approx(4 + 64)
    assert left_open.tolist() == [1.0] * 64


def test_the_learning_rate_ends_at_zero_and_never_exceeds_its_peak() -> None:
    factors = [one_cycle(step, 1000) for step in range(1000)]
    assert factors[0] < 0.05
    assert max(factors) == 1.0
    assert factors[-1] < 1e-4
