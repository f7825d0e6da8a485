"""A safety checker that judges requests differently in one forward: each must get its own verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from safelight.benchmarks.coverage.encoders import SEEING
from safelight.benchmarks.coverage.tokenizing import clip_pictures
from safelight.protocol.config import Config
from safelight.protocol.generation import Generate, Sample
from safelight.tests.tiny.stable_diffusion import sd15_components
from safelight.tests.tiny.weights import ready, seeded
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import Model, load_model
from safelight.worker.requests.sample import SampleRun
from safelight.worker.self_test.self_test import SelfTest

SEEDS = range(6)


def asked(seed: int) -> Generate:
    samples = [Sample(f"shape number {seed}", seed)]
    return Generate(request_id=str(seed), samples=samples, width=64, height=64, num_inference_steps=2)


def plain(pipeline: StableDiffusionPipeline, seed: int) -> tuple[torch.Tensor, bool]:
    """The picture that plain diffusers returns for :func:`asked`, and whether it was flagged."""
    generator = torch.Generator().manual_seed(seed)
    prompt = f"shape number {seed}"
    made = pipeline(prompt, generator=generator, width=64, height=64, num_inference_steps=2, output_type="pt")
    return made.images[0], made.nsfw_content_detected[0]


def strict_for_half(pipeline: StableDiffusionPipeline) -> None:
    """Set the checker's thresholds so that it flags about half of the pictures."""
    checker, embeddings = pipeline.safety_checker, []
    keeping = checker.visual_projection.register_forward_hook(lambda *call: embeddings.append(call[-1][0]))
    for seed in SEEDS:
        plain(pipeline, seed)
    keeping.remove()
    directions = torch.nn.functional.normalize(torch.stack(embeddings), dim=1)
    closeness = (directions @ directions[0]).sort().values
    checker.concept_embeds.data[:] = directions[0]
    checker.concept_embeds_weights.data[:] = (closeness[len(SEEDS) // 2] + closeness[len(SEEDS) // 2 - 1]) / 2
    checker.special_care_embeds_weights.data[:] = 2.0


@pytest.fixture
def checked(tmp_path: Path) -> Model:
    """Stable Diffusion with a checker that flags about half of the pictures."""
    with seeded():
        components = sd15_components() | {
            "safety_checker": SEEING["StableDiffusionSafetyChecker"](),
            "feature_extractor": clip_pictures(),
        }
        pipeline = ready(StableDiffusionPipeline(**components))
    strict_for_half(pipeline)
    pipeline.save_pretrained(tmp_path)
    return load_model(Config(model=str(tmp_path), device="cpu"))


def test_a_flagged_neighbour_neither_blackens_nor_greys_anybody_s_picture(checked: Model) -> None:
    found = SelfTest(checked, Config()).run()
    assert found.mode == "merged", checked.main.batching.reason
    expected = [plain(checked.pipeline, seed) for seed in SEEDS]
    assert {flagged for _, flagged in expected} == {True, False}
    batcher = Batcher(max_batch=16, max_tokens=10**6)
    batcher.policy.unmergeable.update(found.unmergeable)
    runs = [SampleRun(checked, asked(seed), 0, lambda *_: None, lambda _: None) for seed in SEEDS]
    for run in runs:
        batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    assert "safety_checker" in batcher.recovery.merged_names
    for run, (picture, _) in zip(runs, expected, strict=True):
        assert torch.allclose(run.coroutine.result, picture, atol=1e-4, rtol=0)
