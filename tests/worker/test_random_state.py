"""Random numbers drawn without a generator depend on the request's seed alone, not on concurrent requests.

The truth is plain diffusers after ``torch.manual_seed(seed)``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, DiffusionPipeline

from safelight.protocol.config import Config
from safelight.tests.tiny import save
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Cancelled, Coroutine
from safelight.worker.crossing.random_state import has_drawn, random_state, seeded
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.model.model import Model, load_model
from safelight.worker.requests.outputs import first_output
from safelight.worker.requests.sample import SampleRun

from .test_pipelines import request

ONES = torch.ones(2, 3)


def noisy(x: torch.Tensor) -> torch.Tensor:
    """A component that draws in each forward."""
    return x + torch.rand(())


def body(name: str = "transformer") -> torch.Tensor:
    drawn = [torch.rand(())]
    drawn += [cross(Call(name, "__call__", noisy, (ONES,), {})).mean() for _ in range(3)]
    return torch.stack([*drawn, torch.rand(())])


def plainly(seed: int, made: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return made()


def coroutine(seed: int, made: Callable[[], Any] = body) -> Coroutine:
    return Coroutine(made, lambda _: None, random=seeded(seed))


def run(batcher: Batcher, *coroutines: Coroutine) -> list[torch.Tensor]:
    for one in coroutines:
        batcher.start(one)
    while batcher.busy:
        batcher.step()
    return [one.result for one in coroutines]


@pytest.fixture
def batcher() -> Batcher:
    return Batcher(max_batch=4, max_tokens=100, resources=ForwardResources(cache=PromptCache(10**6)))


def test_requests_that_run_together_draw_what_each_draws_alone_and_none_of_it_twice(batcher: Batcher) -> None:
    before = random_state()
    made = run(batcher, coroutine(1), coroutine(2), coroutine(1))
    for seed, one in zip((1, 2, 1), made, strict=True):
        assert torch.equal(one, plainly(seed, body))
    assert "transformer" in batcher.policy.unmergeable, "a forward that draws belongs to one request"
    assert not has_drawn(before)


def test_what_is_cancelled_between_two_draws_leaves_those_of_others_alone(batcher: Batcher) -> None:
    before, gone, other = random_state(), coroutine(1), coroutine(2)
    batcher.start(gone)
    batcher.start(other)
    batcher.step()
    batcher.cancel(gone)
    run(batcher)
    assert isinstance(gone.error, Cancelled)
    assert torch.equal(other.result, plainly(2, body))
    assert not has_drawn(before)


def test_a_prompt_that_is_encoded_with_random_numbers_is_encoded_for_each_request(batcher: Batcher) -> None:
    made = run(batcher, coroutine(1, lambda: body("text_encoder")), coroutine(2, lambda: body("text_encoder")))
    assert torch.equal(made[1], plainly(2, lambda: body("text_encoder")))


@pytest.fixture
def drawing(tmp_path: Path) -> Model:
    """LTX-Video whose decoder adds noise, as that of 0.9.1 does."""
    directory = save("ltx", tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(directory)
    config = dict(pipeline.vae.config) | {"decoder_inject_noise": (True, True, True, True, False)}
    vae = AutoencoderKLLTXVideo.from_config(config)
    vae.load_state_dict(pipeline.vae.state_dict(), strict=False)
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:
            torch.nn.init.constant_(parameter, 0.5)
    vae.save_pretrained(directory / "vae")
    return load_model(Config(model=str(directory), device="cpu"))


def test_a_decoder_that_adds_noise_gives_each_request_its_own(drawing: Model) -> None:
    asked = [request("ltx", index, deterministic=index == 1) for index in range(3)]
    batcher = Batcher(max_batch=4, max_tokens=10**6)
    runs = [SampleRun(drawing, one, 0, lambda *_: None, lambda _: None) for one in asked]
    made = run(batcher, *(one.coroutine for one in runs))
    for sample, clip in zip(runs, made, strict=True):
        expected = plainly(sample.seed, lambda s=sample: first_output(s.task.pipeline(**s.arguments())))
        assert torch.allclose(clip, expected, atol=1e-4)
        if sample.request.deterministic:
            assert torch.equal(clip, expected)
