"""What a model does with a request: by which pipeline, with which arguments, and what they are when not given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from diffusers import DiffusionPipeline

from ..protocol.config import Config
from ..protocol.messages import Batching, Parameter
from .arguments import offered_arguments
from .image_pipelines import image_argument
from .sizes import Sizes, denoiser_config, find_sizes

_NO_LIMIT = 100_000
"""Transformers writes a number far beyond this one where a tokenizer has no limit."""

_LONGEST_TEXT = 4096
"""Tokens, for pipelines that name no default and tokenizers that name no limit."""

_TABLED_SIZES = (16, 32, 64, 128, 256)
"""Sample sizes for which pipelines have a table of aspect ratios."""

UNTESTED = Batching("merged", "not tested")


@dataclass(slots=True)
class Task:
    """A pipeline on the model's components. ``defaults`` are arguments passed where a request gives none.

    ``image_argument`` is where its call takes the image, and ``several_images`` says whether it takes more than one for
    one output. What the self-test finds out is written here by it.
    """

    pipeline: DiffusionPipeline
    kind: Literal["image", "video"]
    arguments: dict[str, Parameter]
    sizes: Sizes
    defaults: dict[str, Any]
    takes_prompt: bool
    image_argument: str | None
    max_pixels: int
    output_type: Literal["pt", "np"] = "pt"
    several_images: bool = False
    supports_preview: bool = False
    batching: Batching = UNTESTED
    tried_size: dict[str, int | None] = field(default_factory=dict)


def new_task(pipeline: DiffusionPipeline, config: Config, published: Mapping[str, Any]) -> Task:
    """``published`` are the checkpoint's own defaults, of which the pipeline takes what it has an argument for."""
    pipeline.set_progress_bar_config(disable=True)
    arguments = _bounded(offered_arguments(pipeline), pipeline, config)
    own = {name: value for name, value in published.items() if name in arguments}
    sizes = find_sizes(pipeline, arguments, own)
    lengths = default_text_length(pipeline, arguments)
    return Task(
        pipeline=pipeline,
        kind="video" if "num_frames" in arguments else "image",
        arguments=arguments,
        sizes=sizes,
        defaults=sizes.overrides | lengths | _binning(pipeline, arguments) | own,
        takes_prompt="prompt" in inspect.signature(type(pipeline).__call__).parameters,
        image_argument=image_argument(type(pipeline)),
        max_pixels=config.max_pixels,
    )


def default_text_length(pipeline: DiffusionPipeline, arguments: Mapping[str, Parameter]) -> dict[str, int]:
    """The pipeline's default text length, cut to the longest text that any of the model's tokenizers is made for."""
    parameter, longest = arguments.get("max_sequence_length"), _longest_text(pipeline)
    if parameter is None or not isinstance(parameter.default, int) or longest is None or longest >= parameter.default:
        return {}
    return {"max_sequence_length": longest}


def _longest_text(pipeline: DiffusionPipeline) -> int | None:
    """Tokens that the most capable of the model's tokenizers is made for; ``None`` when none says."""
    limits = [getattr(part, "model_max_length", None) for part in pipeline.components.values()]
    return max((limit for limit in limits if isinstance(limit, int) and limit < _NO_LIMIT), default=None)


def _bounded(arguments: dict[str, Parameter], pipeline: DiffusionPipeline, config: Config) -> dict[str, Parameter]:
    """Arguments with a maximum where a larger value would only cost time and memory."""
    bounded = dict(arguments)
    for name, parameter in arguments.items():
        if name.endswith("num_inference_steps"):
            bounded[name] = msgspec.structs.replace(parameter, maximum=config.max_steps)
        if name == "max_sequence_length":
            longest = max(parameter.default or 0, _longest_text(pipeline) or 0) or _LONGEST_TEXT
            bounded[name] = msgspec.structs.replace(parameter, maximum=longest)
    return bounded


def _binning(pipeline: DiffusionPipeline, arguments: Mapping[str, Parameter]) -> dict[str, bool]:
    """Leave out the rounding to known aspect ratios where there is no table of them for the model's size."""
    if "use_resolution_binning" not in arguments or denoiser_config(pipeline).get("sample_size") in _TABLED_SIZES:
        return {}
    return {"use_resolution_binning": False}
