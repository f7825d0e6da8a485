"""The text and the image task are tested separately: neither restricts the other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from safelight.protocol.codec import Buffer
from safelight.protocol.config import Config
from safelight.protocol.generation import Generate, Image, Sample
from safelight.tests.tiny import save
from safelight.worker.forward.batcher import Batcher
from safelight.worker.model.model import Model, load_model
from safelight.worker.requests.outputs import first_output
from safelight.worker.requests.sample import SampleRun
from safelight.worker.self_test.self_test import SelfTest

INITIAL_LATENTS = diffusers.StableDiffusionImg2ImgPipeline.prepare_latents


def asked(index: int, *, image: bool, **changes: Any) -> Generate:
    rgb = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
    return Generate(
        request_id=str(index),
        samples=[Sample(f"shape number {index}", index)],
        images=[Image(64, 64, Buffer(rgb.numpy().tobytes()))] if image else [],
        width=None if image else 64,
        height=None if image else 64,
        num_inference_steps=4,
        extra={"strength": 0.75} if image else {},
        **changes,
    )


def plain(model: Model, request: Generate) -> torch.Tensor:
    arguments = SampleRun(model, request, 0, lambda *_: None, lambda _: None).arguments()
    return first_output(model.task(request).pipeline(**arguments))


def together(model: Model, batcher: Batcher, requests: list[Generate]) -> list[torch.Tensor]:
    runs = [SampleRun(model, request, 0, lambda *_: None, lambda _: None) for request in requests]
    for run in runs:
        batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    for run in runs:
        if run.coroutine.error:
            raise run.coroutine.error
    return [run.coroutine.result for run in runs]


def self_tested(config: Config) -> tuple[Model, Batcher]:
    model = load_model(config)
    found = SelfTest(model, config).run()
    batcher = Batcher(max_batch=16, max_tokens=10**6, mode=found.mode)
    batcher.policy.unmergeable.update(found.unmergeable)
    return model, batcher


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_low_precision_makes_no_task_vanish_and_changes_no_picture(dtype: str, tmp_path: Path) -> None:
    """Stable Diffusion XL moves its autoencoder to float32 and back in every request with an image."""
    model, batcher = self_tested(Config(model=str(save("sdxl", tmp_path)), device="cpu", dtype=dtype))
    assert model.image is not None, model.no_image
    requests = [asked(index, image=index % 2 == 1, deterministic=True) for index in range(4)]
    expected = [plain(model, request) for request in requests]
    assert all(torch.equal(a, b) for a, b in zip(expected, together(model, batcher, requests), strict=True))


def test_requests_with_images_that_must_run_alone_leave_the_others_their_shared_forwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the image's pipeline draws noise that no seed determines, so nothing can be compared."""
    calls = itertools.count()

    def prepare_latents(*args: Any, **kwargs: Any) -> torch.Tensor:
        latents: torch.Tensor = INITIAL_LATENTS(*args, **kwargs)
        return latents + torch.rand(latents.shape, generator=torch.Generator().manual_seed(next(calls)))

    monkeypatch.setattr(diffusers.StableDiffusionImg2ImgPipeline, "prepare_latents", prepare_latents)
    model, batcher = self_tested(Config(model=str(save("sd15", tmp_path)), device="cpu"))
    assert model.text is not None
    assert model.image is not None, model.no_image
    assert (model.text.batching.mode, model.image.batching.mode) == ("merged", "serial")
    requests = [asked(index, image=index in (1, 4)) for index in range(6)]
    drawn = together(model, batcher, requests)
    assert "unet" in batcher.recovery.merged_names
    for request, picture in zip(requests, drawn, strict=True):
        assert request.images or torch.allclose(picture, plain(model, request), atol=1e-4, rtol=0)
