"""Diffusers pipelines behind the boundary, beside the same pipelines called plainly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from diffusers import CogVideoXDPMScheduler

from safelight.protocol.config import Config
from safelight.protocol.generation import Generate, Sample
from safelight.protocol.replicas import BatchingMode
from safelight.tests.effort import NIGHTLY
from safelight.tests.tiny import FAMILIES, LIVE_FAMILIES
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.model.model import Model
from safelight.worker.requests.outputs import first_output
from safelight.worker.requests.sample import SampleRun
from safelight.worker.self_test.self_test import SelfTest

PROMPTS = ["a red circle", "two blue squares on a white table", "a star", "a red circle", "one heart", "a red circle"]
SWAPPING = {"sd15_pag", "sd3_pag"}
"""Pipelines that swap the shared modules' attention processors during a call, which meets nobody else's then."""

JSON_FAMILIES = [name for name, family in FAMILIES.items() if "image" not in family.call]
"""Families whose pipelines take a prompt alone."""

NOT_LIVE = [name for name in JSON_FAMILIES if NIGHTLY or name not in LIVE_FAMILIES]
"""Families whose pipelines no live server runs in the same comparison (``tests/system/test_bitwise.py``)."""


def request(name: str, index: int, **changes: Any) -> Generate:
    """Request ``index`` of a mixed load: prompts, seeds and steps all differ."""
    fields = {field.name for field in msgspec.structs.fields(Generate)}
    call = dict(FAMILIES[name].call) | {"num_inference_steps": 2 + index % 2}
    given = {key: value for key, value in call.items() if key in fields}
    extra = {key: value for key, value in call.items() if key not in fields}
    sample = Sample(PROMPTS[index], seed=100 + index)
    return msgspec.structs.replace(Generate(request_id=str(index), samples=[sample], extra=extra, **given), **changes)


def plain(model: Model, asked: Generate) -> torch.Tensor:
    """The unmodified pipeline's output for the request."""
    arguments = SampleRun(model, asked, 0, lambda *_: None, lambda _: None).arguments()
    return first_output(model.task(asked).pipeline(**arguments))


def through_batcher(model: Model, batcher: Batcher, requests: list[Generate]) -> list[torch.Tensor]:
    runs = [SampleRun(model, asked, 0, lambda *_: None, lambda _: None) for asked in requests]
    for run in runs:
        batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    for run in runs:
        if run.coroutine.error:
            raise run.coroutine.error
    return [run.coroutine.result for run in runs]


def new_batcher(mode: BatchingMode = "merged", cache: PromptCache | None = None) -> Batcher:
    return Batcher(max_batch=16, max_tokens=10**6, mode=mode, resources=ForwardResources(cache=cache))


@pytest.mark.parametrize("name", NOT_LIVE)
def test_a_request_through_the_boundary_is_bitwise_what_diffusers_gives(
    name: str, tiny_model: Callable[[str], Model]
) -> None:
    model = tiny_model(name)
    asked = request(name, 1)
    expected = plain(model, asked)
    assert torch.equal(through_batcher(model, new_batcher(), [asked])[0], expected)


def test_a_scheduler_whose_step_takes_the_last_step_s_estimate_too_is_served(
    tiny_model: Callable[[str], Model],
) -> None:
    """CogVideoX with the scheduler that its larger models are recommended with."""
    model = tiny_model("cogvideox")
    pipeline = model.pipeline
    pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    found = SelfTest(model, Config()).run()
    assert (found.mode, model.main.supports_preview) == ("merged", True), model.main.batching.reason
    steps: list[tuple[int, int, int]] = []
    asked = request("cogvideox", 1)
    run = SampleRun(
        model, asked, 0, lambda _, step: steps.append((step.number, step.total, step.index)), lambda _: None
    )
    batcher = new_batcher()
    batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    assert torch.equal(run.coroutine.result, plain(model, asked))
    assert steps == [(1, 3, 0), (2, 3, 1), (3, 3, 2)]


@pytest.mark.parametrize("name", NOT_LIVE)
def test_six_mixed_requests_together_are_what_each_is_alone(name: str, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model(name)
    result = SelfTest(model, Config()).run()
    assert result.mode == "merged", model.main.batching.reason
    requests = [request(name, index) for index in range(6)]
    expected = [plain(model, asked) for asked in requests]
    batcher = new_batcher(result.mode)
    batcher.policy.unmergeable.update(result.unmergeable)
    together = through_batcher(model, batcher, requests)
    worst = max((a - b).abs().max().item() for a, b in zip(expected, together, strict=True))
    assert worst <= 1e-4
    assert batcher.runner.counters.forwards < batcher.runner.counters.calls


@pytest.mark.parametrize("name", [name for name in JSON_FAMILIES if name not in SWAPPING])
def test_a_wide_and_a_tall_picture_of_one_area_keep_their_own_positions(
    name: str, tiny_model: Callable[[str], Model]
) -> None:
    model = tiny_model(name)
    side = FAMILIES[name].call.get("width", 64)
    if side % (2 * model.main.sizes.multiple):
        side *= 2
    shapes = [(side, 2 * side), (2 * side, side)]
    requests = [request(name, 2, width=width, height=height) for width, height in shapes]
    expected = [plain(model, asked) for asked in requests]
    together = through_batcher(model, new_batcher(), requests)
    assert max((a - b).abs().max().item() for a, b in zip(expected, together, strict=True)) <= 1e-4


@pytest.mark.parametrize("name", sorted(SWAPPING))
def test_shared_modules_are_as_they_were_after_the_self_test_and_a_cancelled_request(
    name: str, tiny_model: Callable[[str], Model]
) -> None:
    fresh, model = tiny_model(name), tiny_model(name)
    result = SelfTest(model, Config()).run()
    batcher = new_batcher(result.mode)
    doomed = SampleRun(model, request(name, 0, num_inference_steps=50), 0, lambda *_: None, lambda _: None)
    batcher.start(doomed.coroutine)
    for _ in range(6):
        batcher.step()
    batcher.cancel(doomed.coroutine)
    assert doomed.coroutine.finished
    asked = request(name, 1)
    assert torch.equal(plain(model, asked), plain(fresh, asked))
    asked = request(name, 1, extra=asked.extra | {"pag_scale": 0.0})
    assert torch.equal(through_batcher(model, batcher, [asked])[0], plain(fresh, asked))


@pytest.mark.parametrize("name", ["flux", "wan", "zimage"])
def test_deterministic_requests_are_bitwise_among_merged_neighbours_and_cached_prompts(
    name: str, tiny_model: Callable[[str], Model]
) -> None:
    model = tiny_model(name)
    batcher = new_batcher(cache=PromptCache(2**20))
    through_batcher(model, batcher, [request(name, index) for index in range(6)])
    requests = [request(name, index, deterministic=index == 3) for index in range(6)]
    assert torch.equal(through_batcher(model, batcher, requests)[3], plain(model, requests[3]))


def _remembering(transformer: torch.nn.Module) -> None:
    """Have every forward but a request's first depend on the one before, as with a cache of keys and values."""
    forward = transformer.forward

    def remember(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = vars(transformer).get("before", 0.0)
        transformer.before = hidden_states.mean()
        return forward(hidden_states + before, *args, **kwargs)

    transformer.forward = remember


def test_state_that_a_component_keeps_of_a_request_is_found_out_and_ends_with_the_request(
    tiny_model: Callable[[str], Model],
) -> None:
    model, asked = tiny_model("flux"), request("flux", 1)
    _remembering(model.pipeline.transformer)
    expected = plain(model, asked)
    del model.pipeline.transformer.before
    found = SelfTest(model, Config()).run()
    assert found.mode == "serial"
    assert "state" in model.main.batching.reason
    requests = [request("flux", 0), asked, request("flux", 2), asked]
    drawn = through_batcher(model, new_batcher(found.mode), requests)
    assert torch.equal(drawn[1], expected)
    assert torch.equal(drawn[3], expected)
    assert "before" not in vars(model.pipeline.transformer)


def test_batching_can_be_chosen_by_hand(tiny_model: Callable[[str], Model]) -> None:
    for mode in ("serial", "interleaved"):
        result = SelfTest(tiny_model("flux"), Config(batching=mode)).run()
        assert result.mode == mode


def test_a_prompt_is_encoded_once_for_a_group_of_outputs(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("flux")
    asked = request("flux", 0)
    outputs = [Sample("a red circle", seed) for seed in range(4)]
    requests = [msgspec.structs.replace(asked, samples=[sample]) for sample in outputs]
    counted = {}
    for cache in (None, PromptCache(2**20)):
        batcher = new_batcher("interleaved", cache)
        through_batcher(model, batcher, requests)
        counted[cache is None] = batcher.runner.counters.forwards
    assert counted[True] - counted[False] == 2 * 3, "two text encoders, for three of the four outputs"
