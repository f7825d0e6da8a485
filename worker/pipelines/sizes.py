"""The sizes of a pipeline's outputs: the multiple of width and height, and the default size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import ConfigMixin, DiffusionPipeline

from ...protocol.replicas import Parameter
from .components import DENOISERS

SMALLEST = 4
"""Side of the smallest picture that the self-test tries, in multiples."""

_SMALL_SIDES = (SMALLEST, 8, 16)

_SMALL_FRAMES = (5, 9, 17)

_SPATIAL_FACTORS = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes in pixels. ``overrides`` are defaults to pass because the pipeline's own do not fit this model."""

    multiple: int
    width: int | None
    height: int | None
    overrides: dict[str, int]


def find_sizes(
    pipeline: DiffusionPipeline,
    arguments: Mapping[str, Parameter],
    own: Mapping[str, Any],
    model_defaults: Mapping[str, Any] | None = None,
) -> Sizes:
    """Read the sizes from the checkpoint's defaults, the pipeline's attributes and its components' configurations.

    ``own`` are the pipeline's own defaults, as far as known.
    """
    multiple, trained = _multiple(pipeline), _trained_side(pipeline)
    usual = trained or _default_side(pipeline)
    if "width" not in arguments or "height" not in arguments:
        return Sizes(multiple, usual, usual, {})
    if model_defaults and "width" in model_defaults and "height" in model_defaults:
        return Sizes(multiple, model_defaults["width"], model_defaults["height"], {})
    width, height = own["width"] or usual, own["height"] or usual
    if arguments["width"].default is None and trained is not None and (width, height) != (trained, trained):
        return Sizes(multiple, trained, trained, {"width": trained, "height": trained})
    return Sizes(multiple, width, height, {})


def small_sizes(arguments: Mapping[str, Parameter], sizes: Sizes, *, images: bool = False) -> list[dict[str, int]]:
    """Size arguments for a quick call, from small to the pipeline's default (no arguments).

    With ``images``, a pipeline without arguments for the sides takes them from the images.
    """
    takes_sides = images or ("width" in arguments and "height" in arguments)
    found: list[dict[str, int]] = []
    for multiples in _SMALL_SIDES if takes_sides else ():
        for frames in _SMALL_FRAMES if "num_frames" in arguments else (0,):
            size = {"width": multiples * sizes.multiple, "height": multiples * sizes.multiple}
            found.append(size | ({"num_frames": frames} if frames else {}))
    return [*found, {}]


def denoiser_config(pipeline: DiffusionPipeline) -> Mapping[str, Any]:
    """The denoiser's configuration; empty if no component has a denoiser's name."""
    return _config(pipeline, DENOISERS)


def _config(pipeline: DiffusionPipeline, names: tuple[str, ...]) -> Mapping[str, Any]:
    for name in names:
        component = getattr(pipeline, name, None)
        if component is not None:
            found: Mapping[str, Any] = component.config
            return found
    return {}


def _spatial_factor(pipeline: DiffusionPipeline) -> int:
    values = (getattr(pipeline, name, None) for name in _SPATIAL_FACTORS)
    return next((int(value) for value in values if isinstance(value, int)), 8)


def _multiple(pipeline: DiffusionPipeline) -> int:
    """The least common multiple of the factors that the latents' patches and the pipeline's image processor require."""
    patch = denoiser_config(pipeline).get("patch_size", 1)
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    # ``image_processor`` may also be a vision model's processor, a component without such a factor
    processors = (getattr(pipeline, name, None) for name in ("image_processor", "video_processor"))
    own = next((processor for processor in processors if isinstance(processor, ConfigMixin)), None)
    step = own.config.get("vae_scale_factor", 1) if own is not None else 1
    return math.lcm(_spatial_factor(pipeline) * (patch if isinstance(patch, int) else 1), int(step))


def _default_side(pipeline: DiffusionPipeline) -> int | None:
    side = getattr(pipeline, "default_sample_size", None) or denoiser_config(pipeline).get("sample_size")
    return side * _spatial_factor(pipeline) if isinstance(side, int) else None


def _trained_side(pipeline: DiffusionPipeline) -> int | None:
    """The VAE's training size, for denoisers whose configuration has none.

    FluxPipeline and similar ones hard-code 128 latent pixels per side; for FLUX.1 that is its VAE's ``sample_size``.
    """
    if "sample_size" in denoiser_config(pipeline):
        return None
    side = _config(pipeline, ("vae",)).get("sample_size")
    return side if isinstance(side, int) and hasattr(pipeline, "default_sample_size") else None
