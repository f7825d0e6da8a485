"""A picture that does not fit into memory whole is decoded in tiles, and no other picture is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.policy import FORWARDS_TO_RECOVER
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.forward.tiling import Tiling

LARGE, SMALL = (1, 4, 24, 24), (1, 4, 8, 8)


class Machine:
    """A VAE whose decoder has memory for so many latent pixels at once."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        channels = dict.fromkeys(("block_out_channels",), (8, 8))
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        self.vae = AutoencoderKL(**channels, **blocks, norm_num_groups=4, sample_size=16, latent_channels=4).eval()
        self.vae.requires_grad_(requires_grad=False)
        self.most = 10**9
        self.decoded: list[int] = []
        self.vae.decoder.register_forward_pre_hook(self._takes_memory)

    def _takes_memory(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.decoded.append(args[0].numel())
        if args[0].numel() > self.most:
            raise torch.OutOfMemoryError

    def plain(self, latents: torch.Tensor, *, tiled: bool = False) -> torch.Tensor:
        """diffusers' own, with memory without end."""
        most, self.most = self.most, 10**9
        if tiled:
            self.vae.enable_tiling()
        found: torch.Tensor = self.vae.decode(latents, return_dict=False)[0]
        self.vae.disable_tiling()
        self.most = most
        self.decoded.clear()
        return found


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine()


def decode(machine: Machine, tiling: Tiling | None, *latents: torch.Tensor, plain: bool = False) -> list[Coroutine]:
    batcher = Batcher(max_batch=16, max_tokens=10**6, resources=ForwardResources(tiling=tiling))
    found = []
    for one in latents:
        call = Call("vae", "decode", machine.vae.decode, (one,), {"return_dict": False})
        found.append(Coroutine(lambda call=call: cross(call)[0], lambda _: None, plain=plain))  # type: ignore[misc]
        batcher.start(found[-1])
    machine.decoded.clear()
    while batcher.busy:
        batcher.step()
    assert not machine.vae.use_tiling, "it is a matter of each forward"
    assert not machine.vae.use_slicing
    return found


def results(coroutines: list[Coroutine]) -> list[torch.Tensor]:
    assert [one.error for one in coroutines] == [None] * len(coroutines)
    return [one.result for one in coroutines]


def test_a_decode_that_runs_out_of_memory_alone_gives_what_diffusers_gives_with_tiling(machine: Machine) -> None:
    tiling, large, small = Tiling({"vae": machine.vae}), torch.randn(LARGE), torch.randn(SMALL)
    in_tiles, whole = machine.plain(large, tiled=True), machine.plain(small)
    assert not torch.equal(in_tiles, machine.plain(large)), "so that the tiles are seen"
    machine.most = small.numel()
    assert torch.equal(results(decode(machine, tiling, large))[0], in_tiles)
    assert machine.decoded[0] == large.numel(), "whole first"
    assert torch.equal(results(decode(machine, tiling, large))[0], in_tiles)
    assert max(machine.decoded) < large.numel(), "the next is not tried whole"
    assert torch.equal(results(decode(machine, tiling, small))[0], whole)
    assert tiling.tiled_calls == 2


def test_several_that_run_out_of_memory_together_are_tiled_only_if_each_does_alone(machine: Machine) -> None:
    tiling, latents = Tiling({"vae": machine.vae}), [torch.randn(LARGE) for _ in range(3)]
    machine.most = latents[0].numel()
    expected = [machine.plain(one) for one in latents]
    assert all(torch.equal(a, b) for a, b in zip(results(decode(machine, tiling, *latents)), expected, strict=True))
    assert tiling.tiled_calls == 0
    machine.most -= 1
    expected = [machine.plain(one, tiled=True) for one in latents]
    found = results(decode(machine, tiling, *latents))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert tiling.tiled_calls == 3


def test_a_decode_is_whole_again_when_the_memory_is_back(machine: Machine) -> None:
    tiling, large = Tiling({"vae": machine.vae}), torch.randn(LARGE)
    machine.most = large.numel() - 1
    results(decode(machine, tiling, large))
    machine.most = 10**9
    whole = machine.plain(large)
    for _ in range(FORWARDS_TO_RECOVER):
        found = results(decode(machine, tiling, large))[0]
    assert torch.equal(found, whole)


@pytest.mark.parametrize(("tiles", "plain"), [("auto", True), ("off", False)])
def test_a_deterministic_decode_is_not_tiled_and_fails_alone(machine: Machine, tiles: Any, plain: bool) -> None:
    large = torch.randn(LARGE)
    machine.most = large.numel() - 1
    (failed,) = decode(machine, Tiling({"vae": machine.vae}, tiles), large, plain=plain)
    assert isinstance(failed.error, torch.OutOfMemoryError)


def test_a_call_that_fits_in_no_way_fails_once(machine: Machine) -> None:
    machine.most = 1
    (failed,) = decode(machine, Tiling({"vae": machine.vae}), torch.randn(LARGE))
    assert isinstance(failed.error, torch.OutOfMemoryError)
    assert len(machine.decoded) == 2


def test_tiles_and_slices_that_the_operator_asks_for_are_diffusers_own(machine: Machine) -> None:
    machine.most = 10**9
    latents = [torch.randn(LARGE) for _ in range(2)]
    expected = [machine.plain(one, tiled=True) for one in latents]
    found = results(decode(machine, Tiling({"vae": machine.vae}, "on", slices=True), *latents))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "row by row, so bit by bit"
    whole = machine.plain(latents[0])
    assert torch.equal(results(decode(machine, Tiling({"vae": machine.vae}, "on"), latents[0], plain=True))[0], whole)
