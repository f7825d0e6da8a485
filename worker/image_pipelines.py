"""The pipelines that diffusers has for requests with an image, on components that are loaded already."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_IMAGE2VIDEO_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    AUTO_TEXT2VIDEO_PIPELINES_MAPPING,
)

log = logging.getLogger(__name__)

_MAPPINGS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    (AUTO_TEXT2IMAGE_PIPELINES_MAPPING, AUTO_IMAGE2IMAGE_PIPELINES_MAPPING),
    (AUTO_TEXT2VIDEO_PIPELINES_MAPPING, AUTO_IMAGE2VIDEO_PIPELINES_MAPPING),
)
"""Diffusers' own tables: a family's pipeline for text, and the one for images."""

_FURTHER = {
    "AltDiffusionPipeline": "AltDiffusionImg2ImgPipeline",
    "AmusedPipeline": "AmusedImg2ImgPipeline",
    "ChromaPipeline": "ChromaImg2ImgPipeline",
    "CogVideoXPipeline": "CogVideoXImageToVideoPipeline",
    "HunyuanVideo15Pipeline": "HunyuanVideo15ImageToVideoPipeline",
    "HunyuanVideoPipeline": "HunyuanVideoImageToVideoPipeline",
    "Kandinsky5T2IPipeline": "Kandinsky5I2IPipeline",
    "Kandinsky5T2VPipeline": "Kandinsky5I2VPipeline",
    "LTX2Pipeline": "LTX2ImageToVideoPipeline",
    "MotifVideoPipeline": "MotifVideoImage2VideoPipeline",
    "SanaSprintPipeline": "SanaSprintImg2ImgPipeline",
    "SanaVideoPipeline": "SanaImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingPipeline": "SkyReelsV2DiffusionForcingImageToVideoPipeline",
    "SkyReelsV2Pipeline": "SkyReelsV2ImageToVideoPipeline",
    "WanPipeline": "WanImageToVideoPipeline",
}
"""Pairs that diffusers has and its tables lack. Where the second needs other weights, it will not run."""


_IMAGE_ARGUMENTS = ("image", "control_image")
"""Where a pipeline takes an image: to go on from it, or else, where it has no such argument, to be guided by it."""


def image_argument(pipeline: type[DiffusionPipeline]) -> str | None:
    """The argument that takes the request's image; ``None`` for a pipeline without one."""
    takes = _call(pipeline)
    return next((name for name in _IMAGE_ARGUMENTS if name in takes), None)


def takes_image(pipeline: type[DiffusionPipeline]) -> bool:
    return image_argument(pipeline) is not None


def needs_image(pipeline: type[DiffusionPipeline]) -> bool:
    """Whether it cannot be called without one, as far as its signature says."""
    name = image_argument(pipeline)
    return name is not None and _is_required(_call(pipeline)[name])


def for_images(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """The pipeline itself when it takes images, or else those that may do on its components, the likeliest first."""
    if takes_image(type(pipeline)):
        yield pipeline
        return
    for cls in _partners(type(pipeline)):
        built = _on_components(cls, pipeline)
        if built is not None:
            yield built


def _partners(cls: type[DiffusionPipeline]) -> list[type[DiffusionPipeline]]:
    """The classes for images that diffusers' tables, and then ours, pair with ``cls``."""
    paired = [images.get(family) for texts, images in _MAPPINGS for family, text in texts.items() if text is cls]
    further = getattr(diffusers, _FURTHER.get(cls.__name__, ""), None)
    return [other for other in dict.fromkeys([*paired, further]) if other is not None and takes_image(other)]


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and not variadic


def _on_components(cls: type[DiffusionPipeline], pipeline: DiffusionPipeline) -> DiffusionPipeline | None:
    """A pipeline of ``cls`` that shares every component and setting; ``None`` where it needs one that is not there."""
    known = {**pipeline.config, **pipeline.components}
    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if name in known:
            given[name] = known[name]
        elif _is_required(parameter):
            log.info("%s needs %s, which the model does not have", cls.__name__, name)
            return None
    return cls(**given)


def _call(pipeline: type[DiffusionPipeline]) -> Any:  # Any: mappingproxy of parameters
    return inspect.signature(pipeline.__call__).parameters
