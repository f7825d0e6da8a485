"""What stands in a component's place is asked by pipelines in all the ways in which they ask the component."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from safelight.worker.crossing.boundary import Boundary


class Decoder(nn.Module):
    def forward(self, z: torch.Tensor, num_frames: int = 1) -> torch.Tensor:
        return z * num_frames


def test_a_method_has_the_signature_that_the_component_s_has() -> None:
    decoder = Decoder()
    assert inspect.signature(Boundary(decoder, "vae").forward) == inspect.signature(decoder.forward)


def test_it_is_an_instance_of_the_component_s_class() -> None:
    assert isinstance(Boundary(Decoder(), "vae"), Decoder)


def test_walking_through_all_modules_searches_for_the_name_of_none() -> None:
    class Counting(nn.ModuleList):
        walks = 0

        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            Counting.walks += 1
            return super().named_modules(*args, **kwargs)

    boundary = Boundary(Counting([Decoder() for _ in range(20)]), "transformer")
    modules = list(boundary.modules())
    assert len(modules) == 21
    assert Counting.walks == 1, "the walk itself"
    assert repr(modules[4]) == "Boundary(transformer.3: Decoder)"
