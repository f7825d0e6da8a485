"""Sizes that a pipeline takes: the multiple that width and height must have, and what it makes when none are given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import ConfigMixin, DiffusionPipeline

from ..protocol.replicas import Parameter

DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
"""Components that are called once or more in every denoising step, in the order in which they are looked for."""

SMALLEST = 4
"""Side of the smallest picture to try, in multiples."""

_SMALL_SIDES = (SMALLEST, 8, 16)

_SMALL_FRAMES = (5, 9, 17)

_SPATIAL_FACTORS = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Pixels. ``overrides`` are the defaults that have to be passed, as the pipeline's own do not fit this model."""

    multiple: int
    width: int | None
    height: int | None
    overrides: dict[str, int]


def find_sizes(
    pipeline: DiffusionPipeline,
    arguments: Mapping[str, Parameter],
    own: Mapping[str, Any],
    published: Mapping[str, Any] | None = None,
) -> Sizes:
    """Read the sizes from what the checkpoint says, the pipeline's attributes and its components' configurations.

    ``own`` are the pipeline's own defaults, as far as they are known.
    """
    multiple, trained = _multiple(pipeline), _trained_side(pipeline)
    usual = trained or _default_side(pipeline)
    if "width" not in arguments or "height" not in arguments:
        return Sizes(multiple, usual, usual, {})
    if published and "width" in published and "height" in published:
        return Sizes(multiple, published["width"], published["height"], {})
    width, height = own["width"] or usual, own["height"] or usual
    if arguments["width"].default is None and trained is not None and (width, height) != (trained, trained):
        return Sizes(multiple, trained, trained, {"width": trained, "height": trained})
    return Sizes(multiple, width, height, {})


def small_sizes(arguments: Mapping[str, Parameter], sizes: Sizes, *, images: bool = False) -> list[dict[str, int]]:
    """Arguments of size for a quick call, from small to (none at all) the pipeline's default.

    With ``images``, a pipeline that has no arguments for the sides takes them from those.
    """
    takes_sides = images or ("width" in arguments and "height" in arguments)
    found: list[dict[str, int]] = []
    for multiples in _SMALL_SIDES if takes_sides else ():
        for frames in _SMALL_FRAMES if "num_frames" in arguments else (0,):
            size = {"width": multiples * sizes.multiple, "height": multiples * sizes.multiple}
            found.append(size | ({"num_frames": frames} if frames else {}))
    return [*found, {}]


def denoiser_config(pipeline: DiffusionPipeline) -> Mapping[str, Any]:
    """The configuration of the component that denoises; empty when there is none by a known name."""
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
    """The least common multiple of what the latents' patches and the pipeline's own image processor need."""
    patch = denoiser_config(pipeline).get("patch_size", 1)
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    # what bears the first name may also be a vision model's processor, which is a component and has no such factor
    processors = (getattr(pipeline, name, None) for name in ("image_processor", "video_processor"))
    own = next((processor for processor in processors if isinstance(processor, ConfigMixin)), None)
    step = own.config.get("vae_scale_factor", 1) if own is not None else 1
    return math.lcm(_spatial_factor(pipeline) * (patch if isinstance(patch, int) else 1), int(step))


def _default_side(pipeline: DiffusionPipeline) -> int | None:
    side = getattr(pipeline, "default_sample_size", None) or denoiser_config(pipeline).get("sample_size")
    return side * _spatial_factor(pipeline) if isinstance(side, int) else None


def _trained_side(pipeline: DiffusionPipeline) -> int | None:
    """The VAE's training size, for denoisers whose configuration names none.

    FluxPipeline and its kin assume 128 latent pixels a side in code; for FLUX.1 that equals its VAE's ``sample_size``.
    """
    if "sample_size" in denoiser_config(pipeline):
        return None
    side = _config(pipeline, ("vae",)).get("sample_size")
    return side if isinstance(side, int) and hasattr(pipeline, "default_sample_size") else None
