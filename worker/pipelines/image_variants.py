"""Image variants: diffusers' pipelines for requests with images, on components that are already loaded."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

_ENDINGS = ("Img2ImgPipeline", "ImageToVideoPipeline")
"""Class-name endings of a family's image variants."""

_NAMED_OTHERWISE: dict[str, tuple[str, ...]] = {
    "Kandinsky5T2IPipeline": ("Kandinsky5I2IPipeline",),
    "Kandinsky5T2VPipeline": ("Kandinsky5I2VPipeline",),
    "KandinskyCombinedPipeline": ("KandinskyImg2ImgCombinedPipeline",),
    "KandinskyV22CombinedPipeline": ("KandinskyV22Img2ImgCombinedPipeline",),
    "MotifVideoPipeline": ("MotifVideoImage2VideoPipeline",),
    "SanaPipeline": (),  # SanaImageToVideoPipeline is the variant of SanaVideoPipeline
    "SanaVideoPipeline": ("SanaImageToVideoPipeline",),
}
"""Pipelines whose image variants are named otherwise, or that have none."""

_IMAGE_ARGUMENTS = ("image", "images", "mask_image", "control_image", "control_mask")
"""Arguments for images: the initial image, the mask of the part to redraw, and the control image and its mask."""

_IMAGE_LISTS = frozenset({"images"})
"""Image arguments that require a list even for a single image."""


def image_arguments(pipeline: type[DiffusionPipeline]) -> tuple[str, ...]:
    """The pipeline's arguments for images, in order; empty for a pipeline without."""
    takes = _call(pipeline)
    return tuple(name for name in _IMAGE_ARGUMENTS if name in takes)


def as_taken(argument: str, given: Any) -> Any:
    """One or several images in the form that ``argument`` takes."""
    return [given] if argument in _IMAGE_LISTS and not isinstance(given, list) else given


def takes_image(pipeline: type[DiffusionPipeline]) -> bool:
    return bool(image_arguments(pipeline))


def needs_image(pipeline: type[DiffusionPipeline]) -> bool:
    """True if the pipeline's signature requires an image."""
    return any(_is_required(_call(pipeline)[name]) for name in image_arguments(pipeline))


class IncompatibleComponents(Exception):
    """A pipeline cannot be constructed from another one's components; the message says why."""


def image_variants(cls: type[DiffusionPipeline]) -> list[type[DiffusionPipeline]]:
    """Pipelines for images that may run on the components of ``cls``, the likeliest first; ``cls`` if it takes them."""
    return [cls] if takes_image(cls) else _partners(cls)


def share_components(cls: type[DiffusionPipeline], pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of class ``cls`` with the components and settings of ``pipeline``; itself if the class is the same.

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
    except Exception as error:  # the constructor was not written for these components
        raise IncompatibleComponents(f"{cls.__name__} cannot be made from its components ({error!r})") from error


def _partners(cls: type[DiffusionPipeline]) -> list[type[DiffusionPipeline]]:
    """The image variants by name. One that needs other weights fails in the self-test.

    Diffusers' own tables are not used, because importing them imports every pipeline that they name.
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
