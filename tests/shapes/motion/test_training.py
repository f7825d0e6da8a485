"""A seed determines a training run, an interruption does not change it, and what it exports can be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from torch import Tensor

from safelight.shapes.motion import every_clip, render_clips, sample_clips
from safelight.shapes.motion.train import flow, latents, look, vae
from safelight.shapes.motion.train.export import export
from safelight.shapes.motion.train.flow import Batch, draw_batch, weights
from safelight.shapes.motion.train.latents import Latents, encode, encode_clips
from safelight.shapes.motion.train.model import TextToVelocity, new_model
from safelight.shapes.scene import COLOURS
from safelight.shapes.train import descent
from safelight.shapes.train.run import Run, save

STEPS = 2
TOKENS = 2 * (flow.CLIP_TOKENS + 32)


def run_in(folder: Path, seed: int = 0) -> Run:
    return Run(folder, torch.device("cpu"), seed)


def tiny(seed: int = 0) -> TextToVelocity:
    return new_model(seed, layers=1, heads=2)


def some_latents() -> Latents:
    generator = torch.Generator().manual_seed(0)
    clips = tuple(sample_clips(6, generator))
    clean = torch.randn(6, 16, 5, 8, 8, generator=generator).half()
    mean, deviation = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    return Latents(clips, clean, torch.rand(6, 5, 8, 8, generator=generator) > 0.8, mean, deviation)


def trained(folder: Path, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(99)  # the global generator must not matter
    return flow.train(run_in(folder, seed), some_latents(), STEPS, lambda _, __: "", tiny(seed), TOKENS).state_dict()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_the_same_seed_does_not_train_two_different_models(tmp_path: Path) -> None:
    first = trained(tmp_path / "first")
    assert same(first, trained(tmp_path / "second"))
    assert not same(first, trained(tmp_path / "other", seed=1))


def test_an_interruption_does_not_change_the_model(tmp_path: Path) -> None:
    training = flow.FlowTraining(run_in(tmp_path / "broken"), some_latents(), STEPS, tiny(), TOKENS)
    training.step(0)
    training.save(1)
    assert same(trained(tmp_path / "whole"), trained(tmp_path / "broken"))


def test_an_interruption_does_not_change_the_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on crops and two on whole clips, interrupted after the third."""
    for name, value in {"CROP_BATCH": 2, "WHOLE_BATCH": 2, "WHOLE_CLIPS_FROM": 0.5, "CHECKPOINT_EVERY": 3}.items():
        monkeypatch.setattr(vae, name, value)
    whole = vae.train(run_in(tmp_path / "whole"), 4, width=8)

    def save_and_stop(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(descent, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            vae.train(run_in(tmp_path / "broken"), 4, width=8)
    resumed = vae.train(run_in(tmp_path / "broken"), 4, width=8)
    assert same(whole.state_dict(), resumed.state_dict())


def test_latents_are_whitened_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "every_clip", lambda: every_clip()[:3])
    run, autoencoder = run_in(tmp_path), vae.new_autoencoder(8)
    encoded = encode_clips(run, autoencoder, each=2)
    assert encoded.clips == every_clip()[:3] * 2
    assert encoded.clean.shape == (6, 16, 5, 8, 8)
    assert encoded.clean.float().mean(dim=(0, 2, 3, 4)).tolist() == pytest.approx([0.0] * 16, abs=0.01)
    assert float(encoded.clean.float().std()) == pytest.approx(1.0, abs=0.02)
    again = encode_clips(run, vae.new_autoencoder(8), each=5)  # the stored ones
    assert torch.equal(again.clean, encoded.clean)
    assert torch.equal(again.deviation, encoded.deviation)
    assert again.clips == encoded.clips


def test_what_is_marked_as_the_shape_belongs_to_the_same_jittered_clip(tmp_path: Path) -> None:
    clips = every_clip()[:2]
    run = run_in(tmp_path)
    frames = render_clips(clips, run.generator("latents", 0))
    colour = torch.tensor([COLOURS[clip.colour] for clip in clips])
    covered = (frames - colour[:, None, :, None, None]).abs().sum(dim=2) < 0.01
    last = torch.nn.functional.max_pool2d(covered[:, 13:].float().amax(dim=1), 8) > 0
    marked = encode(run, vae.new_autoencoder(8), clips).shown[:, 4]
    assert bool((marked | ~last).all())
    assert int((marked & ~last).sum()) <= 0.3 * int(marked.sum())


def test_an_exported_model_does_not_depend_on_this_package(tmp_path: Path) -> None:
    export(vae.new_autoencoder(8), tiny(), some_latents(), tmp_path, torch.bfloat16)
    pipeline = WanPipeline.from_pretrained(tmp_path)
    assert pipeline.vae.config.latents_mean == pytest.approx(torch.linspace(-1, 1, 16).tolist())
    assert pipeline.vae.config.latents_std == pytest.approx(torch.linspace(0.5, 2, 16).tolist())
    assert (pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal) == (8, 4)
    kept = json.loads((tmp_path / "safelight.json").read_text())
    assert kept["fps"] == 8
    clips = pipeline(["a red circle", ""], **kept["defaults"], num_inference_steps=1, output_type="np").frames
    assert clips.shape == (2, 17, 64, 64, 3)


def test_exporting_does_not_change_the_model_in_training(tmp_path: Path) -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(vae.new_autoencoder(8), model, some_latents(), tmp_path, torch.bfloat16)
    assert same(before, model.state_dict())


def test_a_long_text_does_not_make_a_step_larger() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [draw_batch(some_latents(), generator) for _ in range(150)]
    assert {batch.length for batch in batches} >= {16, 32, 512}
    assert all(len(batch.clean) * (flow.CLIP_TOKENS + batch.length) <= flow.TOKENS for batch in batches)


def test_weights_favour_no_outcome_where_there_is_no_caption() -> None:
    shown = torch.zeros(2, 5, 8, 8, dtype=torch.bool)
    shown[:, :, :2, :2] = True
    reported, left_open = weights(Batch(torch.zeros(2, 16, 5, 8, 8), shown, ("a red circle moving up", ""), 16))
    assert float(reported.mean()) == pytest.approx(2.0)
    assert float(reported[:, :2, :2].sum()) == pytest.approx(20 + 320)
    assert left_open.unique().tolist() == [1.0]


def test_a_moving_picture_does_not_lose_frames_or_pace(tmp_path: Path) -> None:
    frames = render_clips(sample_clips(3, torch.Generator().manual_seed(0))).movedim(2, -1).numpy()
    look.animate(frames, tmp_path / "clips.gif", columns=2, scale=1)
    with Image.open(tmp_path / "clips.gif") as picture:
        assert picture.size == (2 * 66, 2 * 66)
        assert (picture.n_frames, picture.info["duration"], picture.info["loop"]) == (17, 120, 0)
    assert look.strips(frames, columns=2).size == (2 * 5 * 66, 2 * 66)
