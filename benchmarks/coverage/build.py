"""From a pipeline's name to its tiny form, with the same random weights each time."""

from __future__ import annotations

import diffusers
from diffusers import DiffusionPipeline

from safelight.tests.tiny.weights import ready, seeded

from . import image_pipelines, text_pipelines
from .changes import Tiny
from .parts import Parts

TINY: dict[str, Tiny] = text_pipelines.TINY | image_pipelines.TINY
"""The particulars of pipelines' tiny forms, keyed by class name."""


def build(name: str) -> DiffusionPipeline:
    """The tiny form of the pipeline class ``name``. Raises ``NoForm``, or what the constructors raise."""
    pipeline = getattr(diffusers, name)
    with seeded():
        return ready(pipeline(**Parts(pipeline, particulars(name).changes).make()))


def particulars(name: str) -> Tiny:
    """The particulars of the tiny form of ``name``; empty for most."""
    return TINY.get(name, Tiny())
