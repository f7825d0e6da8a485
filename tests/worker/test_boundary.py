"""What stands in a component's place is asked by pipelines in all the ways in which they ask the component."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from safelight.worker.boundary import Boundary


class Decoder(nn.Module):
    def forward(self, z: torch.Tensor, num_frames: int = 1) -> torch.Tensor:
        return z * num_frames


def test_a_method_has_the_signature_that_the_component_s_has() -> None:
    decoder = Decoder()
    assert inspect.signature(Boundary(decoder, "vae").forward) == inspect.signature(decoder.forward)


def test_it_is_an_instance_of_the_component_s_class() -> None:
    assert isinstance(Boundary(Decoder(), "vae"), Decoder)
