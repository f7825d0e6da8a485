"""A GPU whose kernels add up in any order still shares its forwards, and a pipeline that keeps state does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from safelight.protocol.config import Config
from safelight.tests.effort import NIGHTLY, chosen
from safelight.worker.model.model import load_model
from safelight.worker.self_test.probe import BatchingDecision, BatchingProbe

from .device import PLAYED, TYPE, device

NOISE = 1e-6
forward = FluxTransformer2DModel.forward


def decision(path: Path) -> BatchingDecision:
    model = load_model(Config(model=str(path), device=TYPE, dtype="float32"), device())
    return BatchingProbe(model, Config(), lambda _: None, lambda _: None, None, images=False).probe()


def with_noise(scale: float) -> Callable[..., tuple[torch.Tensor]]:
    """FLUX whose sums end differently in each run, whatever the seed."""
    own = torch.Generator().manual_seed(1)

    def noisy(self: FluxTransformer2DModel, *args: object, **kwargs: object) -> tuple[torch.Tensor]:
        (made,) = forward(self, *args, **kwargs)
        return (made + scale * torch.randn(made.shape, generator=own).to(made.device),)

    return noisy


@pytest.mark.parametrize(
    ("scale", "mode"), chosen((NOISE, "merged" if TYPE == "cuda" else "serial"), nightly=[(1.0, "serial")])
)
def test_rounding_that_is_not_repeatable_does_not_prevent_merging_and_chance_does(
    scale: float, mode: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FluxTransformer2DModel, "forward", with_noise(scale))
    found = decision(checkpoint("flux"))
    assert found.mode == mode, found.reason


@pytest.mark.skipif(PLAYED and not NIGHTLY, reason="the worker's tests have it on a CPU in every run")
def test_state_that_requests_share_is_not_taken_for_rounding(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = torch.zeros(1)

    def leaking(self: FluxTransformer2DModel, *args: object, **kwargs: object) -> tuple[torch.Tensor]:
        """The last call's output is part of this one's, as long as both have the same size."""
        nonlocal last
        (made,) = forward(self, *args, **kwargs)
        before, last = last, made
        return (made + 0.1 * (before if before.shape == made.shape else torch.zeros_like(made)),)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", leaking)
    assert decision(checkpoint("flux")).mode == "serial"
