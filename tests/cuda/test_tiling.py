"""A decode for which the device has too little memory is computed in tiles, there as in plain diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from safelight.tests.played import Record
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.forward.tiling import Tiling

from .device import device, played_only


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    made = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, latent_channels=4)
    return made.eval().to(device())


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> Coroutine:
    batcher = Batcher(max_batch=16, max_tokens=10**6, resources=ForwardResources(tiling=Tiling({"vae": vae})))
    call = Call("vae", "decode", vae.decode, (latents,), {"return_dict": False})
    coroutine = Coroutine(lambda: cross(call)[0], lambda _: None)
    batcher.start(coroutine)
    while batcher.busy:
        batcher.step()
    return coroutine


@played_only
def test_a_decode_that_needs_too_much_memory_is_tiled(vae: AutoencoderKL, record: Record) -> None:
    latents = torch.randn(1, 4, 24, 24, device=device())
    whole = vae.decode(latents, return_dict=False)[0]
    vae.enable_tiling()
    live = torch.cuda.memory_allocated(device())
    torch.cuda.reset_peak_memory_stats(device())
    in_tiles = vae.decode(latents, return_dict=False)[0]
    needed = torch.cuda.max_memory_allocated(device()) - live
    vae.disable_tiling()
    assert torch.equal(decoded(vae, latents).result, whole)
    record.memory(device()).limit = torch.cuda.memory_allocated(device()) + needed + 10_000
    found = decoded(vae, latents)
    assert found.error is None
    assert torch.equal(found.result, in_tiles)
