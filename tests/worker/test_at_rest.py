"""A forward that fails halfway leaves nothing in its component for those that come after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLMagvit

from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.at_rest import AtRest
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources


@pytest.fixture
def vae() -> AutoencoderKLMagvit:
    """EasyAnimate's, whose convolutions keep the last frames of a chunk for the next chunk."""
    torch.manual_seed(0)
    return AutoencoderKLMagvit(
        latent_channels=2,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def decoded(vae: AutoencoderKLMagvit, batcher: Batcher, clips: list[torch.Tensor]) -> list[Any]:
    def decode(latents: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = cross(Call("vae", "decode", vae.decode, (latents,), {})).sample
        return made

    coroutines = [Coroutine(lambda latents=clip: decode(latents), lambda _: None) for clip in clips]
    for coroutine in coroutines:
        batcher.start(coroutine)
    while batcher.busy:
        batcher.step()
    return [coroutine.error or coroutine.result for coroutine in coroutines]


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("full"), ValueError("odd")])
def test_a_clip_that_fails_halfway_leaves_no_frames_in_the_next_ones(
    failure: Exception, vae: AutoencoderKLMagvit
) -> None:
    clips = [torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    plain = copy.deepcopy(vae)
    expected = [plain.decode(clip).sample for clip in clips]
    batcher = Batcher(max_batch=16, max_tokens=10**6, resources=ForwardResources(at_rest=AtRest({"vae": vae})))
    chunks = 0

    def fail_once(*_: Any) -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 2:
            raise failure

    vae.decoder.register_forward_hook(fail_once)
    drawn = decoded(vae, batcher, clips)  # together, which fails, and then one by one
    assert all(map(torch.equal, drawn, expected))
    chunks = 0
    (error,) = decoded(vae, batcher, clips[:1])
    assert error is failure
    (again,) = decoded(vae, batcher, clips[1:])
    assert torch.equal(again, expected[1])
