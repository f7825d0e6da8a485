"""The pipelines that diffusers has for requests with an image, on components that are loaded already."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

_ENDINGS = ("Img2ImgPipeline", "ImageToVideoPipeline")
"""How diffusers names a family's pipeline for images, after the one for text."""

_NAMED_OTHERWISE: dict[str, tuple[str, ...]] = {
    "Kandinsky5T2IPipeline": ("Kandinsky5I2IPipeline",),
    "Kandinsky5T2VPipeline": ("Kandinsky5I2VPipeline",),
    "KandinskyCombinedPipeline": ("KandinskyImg2ImgCombinedPipeline",),
    "KandinskyV22CombinedPipeline": ("KandinskyV22Img2ImgCombinedPipeline",),
    "MotifVideoPipeline": ("MotifVideoImage2VideoPipeline",),
    "SanaPipeline": (),  # the one that is named after it is for SanaVideoPipeline
    "SanaVideoPipeline": ("SanaImageToVideoPipeline",),
}
"""Those whose pipelines for images have other names, or that have none."""

_IMAGE_ARGUMENTS = ("image", "images", "mask_image", "control_image", "control_mask")
"""Where a pipeline takes images: what it goes on from, what of that it draws anew, and what guides it, where."""

_IMAGE_LISTS = frozenset({"images"})
"""Those of them that take a list, also of a single image."""


def image_arguments(pipeline: type[DiffusionPipeline]) -> tuple[str, ...]:
    """The arguments that take the request's images, in their order; none for a pipeline without images."""
    takes = _call(pipeline)
    return tuple(name for name in _IMAGE_ARGUMENTS if name in takes)


def as_taken(argument: str, given: Any) -> Any:
    """One image or several as ``argument`` takes them: some arguments take a list only."""
    return [given] if argument in _IMAGE_LISTS and not isinstance(given, list) else given


def takes_image(pipeline: type[DiffusionPipeline]) -> bool:
    return bool(image_arguments(pipeline))


def needs_image(pipeline: type[DiffusionPipeline]) -> bool:
    """Whether it cannot be called without one, as far as its signature says."""
    return any(_is_required(_call(pipeline)[name]) for name in image_arguments(pipeline))


class IncompatibleComponents(Exception):
    """A pipeline cannot be made from the components that there are; the message says why."""


def image_variants(cls: type[DiffusionPipeline]) -> list[type[DiffusionPipeline]]:
    """``cls`` itself when it takes images, or else those that may do on its components, the likeliest first."""
    return [cls] if takes_image(cls) else _partners(cls)


def share_components(cls: type[DiffusionPipeline], pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of ``cls`` that shares every component and setting of ``pipeline``, or is it.

    Raises ``IncompatibleComponents``.
    """
    if type(pipeline) is cls:
        return pipeline
    known = {**pipeline.config, **pipeline.components}
    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(cls.__init__).parameters.items())[1:]:
        if name in known:
            given[name] = known[name]
        elif _is_required(parameter):
            raise IncompatibleComponents(f"{cls.__name__} needs {name}, which the model does not have")
    try:
        return cls(**given)
    except Exception as error:  # a constructor that was not written for these components
        raise IncompatibleComponents(f"{cls.__name__} cannot be made from its components ({error!r})") from error


def _partners(cls: type[DiffusionPipeline]) -> list[type[DiffusionPipeline]]:
    """The classes for images that are named after ``cls``. Where one needs other weights, it will not run.

    Diffusers' own tables of such pairs are not asked, as that imports every pipeline that they name.
    """
    family = cls.__name__.removesuffix("Pipeline")
    names = _NAMED_OTHERWISE.get(cls.__name__, tuple(family + ending for ending in _ENDINGS))
    found = [getattr(diffusers, name, None) for name in names]
    return [other for other in found if other is not None and takes_image(other)]


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and not variadic


def _call(pipeline: type[DiffusionPipeline]) -> Any:  # Any: mappingproxy of parameters
    return inspect.signature(pipeline.__call__).parameters
