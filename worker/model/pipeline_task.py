"""A pipeline task: the pipeline for one kind of request, its arguments and their defaults."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from diffusers import DiffusionPipeline

from ...protocol.config import Config, most_pixels
from ...protocol.replicas import Batching, Parameter
from ..pipelines.arguments import offered_arguments
from ..pipelines.bounds import bounded
from ..pipelines.image_variants import image_arguments
from ..pipelines.sizes import Sizes, find_sizes
from .first_call import variables_at_first_call

_NO_LIMIT = 100_000
"""Transformers uses a far larger number for tokenizers without a limit."""

UNTESTED = Batching("merged", "not tested")


@dataclass(slots=True)
class PipelineTask:
    """A pipeline on the model's components. ``defaults`` are passed for arguments that a request does not give.

    A ``deterministic`` request gets ``plain_defaults`` instead: what diffusers requires, and the checkpoint's own
    defaults. ``arguments`` have the effective defaults of other requests. ``image_arguments`` take one image each; if
    there is a single one, ``several_images`` says whether it takes several for one output. The self-test sets the
    fields that depend on a run.
    """

    pipeline: DiffusionPipeline
    kind: Literal["image", "video"]
    arguments: dict[str, Parameter]
    sizes: Sizes
    defaults: dict[str, Any]
    plain_defaults: dict[str, Any]
    deterministic_defaults: dict[str, Any]
    """Effective defaults of a ``deterministic`` request that differ from those of other requests."""
    takes_prompt: bool
    image_arguments: tuple[str, ...]
    max_pixels: int
    output_type: Literal["pt", "np"] = "pt"
    several_images: bool = False
    supports_preview: bool = False
    batching: Batching = UNTESTED
    tried_size: dict[str, int | None] = field(default_factory=dict)

    def require(self, names: Collection[str]) -> None:
        """Make ``names`` the required arguments."""
        self.arguments = {
            name: msgspec.structs.replace(parameter, is_required=name in names)
            for name, parameter in self.arguments.items()
        }


def new_task(
    pipeline: DiffusionPipeline, config: Config, model_defaults: Mapping[str, Any], *, images: bool = False
) -> PipelineTask:
    """Make the task of ``pipeline``. ``model_defaults`` without a matching argument are ignored.

    With ``images``, width and height have no default, because they follow from the image.
    """
    pipeline.set_progress_bar_config(disable=True)
    arguments = bounded(offered_arguments(pipeline), config, _longest_text(pipeline))
    model_defaults = {name: value for name, value in model_defaults.items() if name in arguments}
    needed, made = _needed(pipeline, arguments, image_arguments(type(pipeline)) if images else ())
    own = _own_defaults(arguments, made)
    sizes = find_sizes(pipeline, arguments, own, model_defaults)
    plain = needed | model_defaults
    defaults = sizes.overrides | default_text_length(pipeline, arguments) | plain
    of_images = {"width": None, "height": None} if images else {}
    own |= plain | of_images
    effective = own | defaults | of_images
    return PipelineTask(
        pipeline=pipeline,
        kind="video" if "num_frames" in arguments else "image",
        arguments={
            name: msgspec.structs.replace(parameter, default=effective[name]) for name, parameter in arguments.items()
        },
        sizes=sizes,
        defaults=defaults,
        plain_defaults=plain,
        deterministic_defaults={
            name: own[name] for name in sorted(defaults.keys() - plain.keys()) if own[name] != effective[name]
        },
        takes_prompt="prompt" in inspect.signature(type(pipeline).__call__).parameters,
        image_arguments=image_arguments(type(pipeline)),
        max_pixels=most_pixels(config, sizes.width, sizes.height),
    )


def default_text_length(pipeline: DiffusionPipeline, arguments: Mapping[str, Parameter]) -> dict[str, int]:
    """The pipeline's default text length if it exceeds what every tokenizer of the model supports, cut to that."""
    parameter, longest = arguments.get("max_sequence_length"), _longest_text(pipeline)
    if parameter is None or not isinstance(parameter.default, int) or longest is None or longest >= parameter.default:
        return {}
    return {"max_sequence_length": longest}


def _longest_text(pipeline: DiffusionPipeline) -> int | None:
    """The largest length in tokens that a tokenizer of the model supports; ``None`` if none declares one."""
    limits = [getattr(part, "model_max_length", None) for part in pipeline.components.values()]
    return max((limit for limit in limits if isinstance(limit, int) and limit < _NO_LIMIT), default=None)


def _needed(
    pipeline: DiffusionPipeline, arguments: Mapping[str, Parameter], pictures_as: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments without which the pipeline refuses its own defaults, and its local variables with them.

    Some pipelines bin sizes to known aspect ratios, by a table that has no entry for a model of another size.
    """
    without = {"use_resolution_binning": False}
    made = variables_at_first_call(pipeline, pictures_as)
    if made is None and without.keys() <= arguments.keys():
        made = variables_at_first_call(pipeline, pictures_as, **without)
        return ({} if made is None else without), made or {}
    return {}, made or {}


def _own_defaults(arguments: Mapping[str, Parameter], made: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's own value for each argument that is not given: the signature's default, or a computed one."""
    own = {name: parameter.default for name, parameter in arguments.items()}
    computed = {name: made.get(name) for name, default in own.items() if default is None}
    return own | {name: value for name, value in computed.items() if isinstance(value, int | float)}
