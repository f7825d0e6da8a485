"""A boundary answers pipelines in every way in which they query the component."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from safelight.worker.crossing.boundary import Boundary
from safelight.worker.crossing.fork import Fork
from safelight.worker.crossing.overlay import Overlay, overlay_attributes, put_overlay
from safelight.worker.offloading.overlay import OffloadedComponent


class Decoder(nn.Module):
    def forward(self, z: torch.Tensor, num_frames: int = 1) -> torch.Tensor:
        return z * num_frames


def test_a_method_has_the_signature_that_the_component_s_has() -> None:
    decoder = Decoder()
    assert inspect.signature(Boundary(decoder, "vae").forward) == inspect.signature(decoder.forward)


def test_it_is_an_instance_of_the_component_s_class() -> None:
    assert isinstance(Boundary(Decoder(), "vae"), Decoder)


def test_a_component_with_several_overlays_has_its_own_class_and_signature_for_pipelines() -> None:
    decoder, plain = Decoder(), Decoder()
    put_overlay(OffloadedComponent, decoder, torch.device("cpu"))
    put_overlay(First, decoder, "first")
    boundary = Boundary(decoder, "vae")
    assert boundary.__class__ is Decoder
    assert inspect.signature(boundary.forward) == inspect.signature(plain.forward)
    assert torch.equal(decoder(torch.ones(2), num_frames=3), plain(torch.ones(2), num_frames=3))
    assert (type(decoder).__name__, overlay_attributes(decoder)) == ("Decoder", {"offloaded", "first"})


class First(Overlay):
    overlay_attribute = "first"


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


class Asking:
    """A mixin of a pipeline that uses ``type`` in every way."""

    def types_of(self, part: Any) -> list[Any]:
        table = {Decoder: "found"}
        return [
            type(part) is Decoder,
            type(part) == Decoder,  # noqa: E721
            type(part) in (Decoder, nn.Linear),
            type(part).__name__,
            table.get(type(part)),
            isinstance(part, type),
            isinstance(type(part), type),
            issubclass(type(type(part)), type),
            type("Own", (Decoder,), {}).__bases__,
            type[Decoder],
        ]


class AskingPipeline(Asking, DiffusionPipeline):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.register_modules(vae=vae)

    def __call__(self) -> list[list[Any]]:
        return [self.types_of(part) for part in (self.vae, *self.vae.children(), Decoder, 3)]


def test_a_pipeline_sees_the_exact_types_of_modules_as_without_a_boundary() -> None:
    class Nested(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Decoder()

    pipeline = AskingPipeline(Nested())
    expected = pipeline()
    assert expected[1][:5] == [True, True, True, "Decoder", "found"]
    with Fork(pipeline) as forked:
        assert forked() == expected
    assert pipeline() == expected
