"""The pipelines that diffusers has for requests with an image, on components that are loaded already."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import (
    AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
    AUTO_IMAGE2VIDEO_PIPELINES_MAPPING,
    AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
    AUTO_TEXT2VIDEO_PIPELINES_MAPPING,
)

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


class DoesNotFit(Exception):
    """A pipeline cannot be made from the components that there are; the message says why."""


def for_images(cls: type[DiffusionPipeline]) -> list[type[DiffusionPipeline]]:
    """``cls`` itself when it takes images, or else those that may do on its components, the likeliest first."""
    return [cls] if takes_image(cls) else _partners(cls)


def on_components(cls: type[DiffusionPipeline], pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of ``cls`` that shares every component and setting of ``pipeline``, or is it.

    Raises ``DoesNotFit``.
    """
    if type(pipeline) is cls:
        return pipeline
    known = {**pipeline.config, **pipeline.components}
    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if name in known:
            given[name] = known[name]
        elif _is_required(parameter):
            raise DoesNotFit(f"{cls.__name__} needs {name}, which the model does not have")
    try:
        return cls(**given)
    except Exception as error:  # a constructor that was not written for these components
        raise DoesNotFit(f"{cls.__name__} cannot be made from its components ({error!r})") from error


def _partners(cls: type[DiffusionPipeline]) -> list[type[DiffusionPipeline]]:
    """The classes for images that diffusers' tables, and then ours, pair with ``cls``."""
    paired = [images.get(family) for texts, images in _MAPPINGS for family, text in texts.items() if text is cls]
    further = getattr(diffusers, _FURTHER.get(cls.__name__, ""), None)
    return [other for other in dict.fromkeys([*paired, further]) if other is not None and takes_image(other)]


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and not variadic


def _call(pipeline: type[DiffusionPipeline]) -> Any:  # Any: mappingproxy of parameters
    return inspect.signature(pipeline.__call__).parameters
