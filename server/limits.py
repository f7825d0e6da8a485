"""What one request may ask for: ranges from the configuration, and what the model can do."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..protocol.adapters import Use
from ..protocol.config import MOST_PIXELS, Config, most_pixels
from ..protocol.errors import InvalidRequest
from ..protocol.generation import Generate, Image, OutputFormat, Sample
from ..protocol.replicas import ImageTask, ModelInfo, Parameter
from .schemas import GenerateBody, near

FORMATS: dict[str, tuple[OutputFormat, ...]] = {
    "image": ("png", "jpeg", "webp", "pt"),
    "video": ("mp4", "webm", "pt"),
}
"""The formats of each kind of model, the default first."""

_LONGEST_TIMEOUT_S = 7 * 24 * 3600.0
_BEYOND = 2**63
_PIPELINE_FIELDS = (
    "negative_prompt", "width", "height", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale",
)  # fmt: skip
_SIDES = ("width", "height")
_RATE = "fps"  # the request's is the rate at which the clip plays; a pipeline's is what its model is told
_EXTRA_VALUES = 10_000
_EXTRA_DEPTH = 32
_SCHEDULES = ("timesteps", "sigmas")  # arguments whose length is a number of steps


@dataclass(frozen=True)
class Range:
    """The values from ``low`` to ``high``, both included."""

    low: float
    high: float

    def check(self, name: str, value: float, field: str | None = None) -> None:
        if not self.low <= value <= self.high:
            low, high = (f"{bound:.0f}" if bound == int(bound) else f"{bound:g}" for bound in (self.low, self.high))
            raise InvalidRequest(f"{name} must be between {low} and {high}, not {value}.", field=field or name)


def ranges(config: Config) -> dict[str, Range]:
    """What each numeric field may be, whatever the model."""
    return {
        "width": Range(1, config.max_pixels or MOST_PIXELS),
        "height": Range(1, config.max_pixels or MOST_PIXELS),
        "num_frames": Range(1, config.max_frames),
        "fps": Range(1, 240),
        "num_inference_steps": Range(1, config.max_steps),
        "guidance_scale": Range(0, 1000),
        "true_cfg_scale": Range(0, 1000),
        "n": Range(1, config.max_outputs),
        "num_outputs_per_prompt": Range(1, config.max_outputs),
        "priority": Range(-1_000_000, 1_000_000),
        "timeout_s": Range(0.001, _LONGEST_TIMEOUT_S),
        "preview_every": Range(0, config.max_steps),
    }


def check_ranges(body: GenerateBody, config: Config) -> None:
    """Raise ``InvalidRequest`` for what no model may be asked for."""
    names = [use.name for use in body.lora or ()]
    if len(set(names)) < len(names):
        raise InvalidRequest("An adapter is named twice; give each once, with its scale.", field="lora")
    for name, allowed in ranges(config).items():
        if (value := getattr(body, name)) is not None:
            allowed.check(name, value)
    if body.num_outputs_per_prompt is not None and "n" in body.model_fields_set and body.n != outputs_per_prompt(body):
        raise InvalidRequest("n and num_outputs_per_prompt are the same, and were given different values.", field="n")
    total = len(body.prompt) * outputs_per_prompt(body)
    if total > config.max_outputs:
        raise InvalidRequest(
            f"A request may have between 1 and {config.max_outputs} outputs; {len(body.prompt)} prompts "
            f"with n = {outputs_per_prompt(body)} make {total}.",
            field="prompt" if len(body.prompt) > config.max_outputs else "n",
        )
    _check_texts(body, config)
    _check_seeds(body)
    if body.preview_every and not body.stream:
        raise InvalidRequest("preview_every needs stream = true.", field="preview_every")


def check_model(body: GenerateBody, images: int, model: ModelInfo, config: Config) -> None:
    """Raise ``InvalidRequest`` for what this model cannot do with so many images."""
    task = _task(images, model)
    resizes = images > 0 and "strength" in task.arguments  # what is drawn over can have any size
    for name in _PIPELINE_FIELDS:
        if getattr(body, name) is not None and name not in task.arguments and not (resizes and name in _SIDES):
            raise InvalidRequest(f"{task.pipeline} does not take {name}; leave it out.", field=name)
    if body.fps is not None and "num_frames" not in model.arguments:
        raise InvalidRequest(f"{model.pipeline} makes no videos, so it does not take fps; leave it out.", field="fps")
    _check_size(body, model, task.size_multiple, config)
    if body.preview_every and not task.supports_preview:
        raise InvalidRequest(
            f"Previews are not available for {task.pipeline}; preview_every must be 0.", field="preview_every"
        )
    if body.output_format is not None and body.output_format not in FORMATS[model.kind]:
        raise InvalidRequest(
            f"output_format must be one of {', '.join(FORMATS[model.kind])} for a model that makes {model.kind}s.",
            field="output_format",
        )
    _check_required(body, task)
    _check_bulk(body.extra)
    for name, value in body.extra.items():
        _check_extra(name, value, task, config)


def _check_required(body: GenerateBody, task: ModelInfo | ImageTask) -> None:
    for name in (name for name, argument in task.arguments.items() if argument.is_required):
        given = getattr(body, name) if name in _PIPELINE_FIELDS else body.extra.get(name)
        if given is None:
            field = name if name in _PIPELINE_FIELDS else f"extra.{name}"
            raise InvalidRequest(f"{task.pipeline} does not run without {name}; give {field}.", field=field)


def _task(images: int, model: ModelInfo) -> ModelInfo | ImageTask:
    """What the model does with so many images: all that is asked about here has the same names in both."""
    if images == 0:
        if not model.takes_text_alone:
            raise InvalidRequest(f"{model.pipeline} needs an image to begin with.", field="image")
        return model
    if model.image_task is None:
        raise InvalidRequest(f"{model.model} takes no image: {model.no_image}.", field="image")
    _check_number(images, model.image_task)
    return model.image_task


def _check_number(images: int, task: ImageTask) -> None:
    needed = task.image_arguments
    if len(needed) > 1 and images != len(needed):
        named = f"{len(needed)} images, in this order: {', '.join(needed)}"
        raise InvalidRequest(f"{task.pipeline} takes {named}; not {images}.", field="image")
    if len(needed) == 1 and images > 1 and not task.several_images:
        raise InvalidRequest(f"{task.pipeline} takes one image, not {images}.", field="image")


def to_message(
    body: GenerateBody, images: list[Image], request_id: str, output_format: OutputFormat, config: Config
) -> Generate:
    """The checked ``body`` as the scheduler takes it, with a seed for every output."""
    per_prompt = outputs_per_prompt(body)
    return Generate(
        request_id=request_id,
        samples=[
            Sample(prompt, seed)
            for prompt, seed in zip(
                (prompt for prompt in body.prompt for _ in range(per_prompt)), _seeds(body), strict=True
            )
        ],
        images=images,
        negative_prompt=body.negative_prompt,
        width=body.width,
        height=body.height,
        num_frames=body.num_frames,
        fps=body.fps,
        num_inference_steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        true_cfg_scale=body.true_cfg_scale,
        output_format=output_format,
        deterministic=body.deterministic,
        preview_every=body.preview_every,
        progress=body.stream,
        extra=body.extra,
        priority=body.priority,
        timeout_s=config.request_timeout_s if body.timeout_s is None else body.timeout_s,
        lora=None if body.lora is None else [Use(use.name, use.scale) for use in body.lora],
    )


def outputs_per_prompt(body: GenerateBody) -> int:
    return body.n if body.num_outputs_per_prompt is None else body.num_outputs_per_prompt


def _seeds(body: GenerateBody) -> list[int]:
    """One seed for each output, prompt by prompt."""
    prompts, n = len(body.prompt), outputs_per_prompt(body)
    first = body.seed
    if first is None:
        first = [secrets.randbelow(2**32 - n) for _ in range(prompts)]
    elif len(first) == 1:
        first = first * prompts
    if len(first) == prompts:
        return [seed + i for seed in first for i in range(n)]
    return first


def _check_seeds(body: GenerateBody) -> None:
    if body.seed is None:
        return
    prompts, n = len(body.prompt), outputs_per_prompt(body)
    lengths = sorted({1, prompts, prompts * n})
    if len(body.seed) not in lengths:
        raise InvalidRequest(
            f"seed must be one integer or a list of {' or '.join(map(str, lengths))} "
            f"for {prompts} prompts with n = {n}, not of {len(body.seed)}.",
            field="seed",
        )
    for seed in (min(body.seed), max(_seeds(body))):
        if not 0 <= seed < _BEYOND:
            raise InvalidRequest(
                f"seed must be between 0 and {_BEYOND - 1}, counted up to the last output; {seed} is not.", field="seed"
            )


def _check_texts(body: GenerateBody, config: Config) -> None:
    texts = [("prompt", prompt) for prompt in body.prompt]
    texts += [("negative_prompt", body.negative_prompt)] if body.negative_prompt is not None else []
    texts += [(f"extra.{name}", value) for name, value in body.extra.items() if isinstance(value, str)]
    for field, text in texts:
        if len(text) > config.max_prompt_chars:
            raise InvalidRequest(
                f"{field} must have between 0 and {config.max_prompt_chars} characters, not {len(text)}.", field=field
            )


def _check_size(body: GenerateBody, model: ModelInfo, multiple: int, config: Config) -> None:
    most = most_pixels(config, model.default_width, model.default_height)
    for name, value in (("width", body.width), ("height", body.height)):
        if value is not None and (value < multiple or value % multiple):
            raise InvalidRequest(
                f"{name} must be a multiple of {multiple} between {multiple} and {most // multiple}, not {value}.",
                field=name,
            )
    if body.width is None and body.height is None:
        return  # what the model makes by itself is not the request's doing
    usual = {"width": model.default_width, "height": model.default_height}
    if body.deterministic:
        usual |= {side: model.deterministic_defaults.get(side, usual[side]) for side in _SIDES}
    width, height = body.width or usual["width"] or multiple, body.height or usual["height"] or multiple
    if width * height > most:
        raise InvalidRequest(
            f"width x height must be between {multiple * multiple} and {most} pixels; "
            f"{width} x {height} are {width * height}.",
            field="width" if body.width else "height",
        )


def _check_extra(name: str, value: Any, task: ModelInfo | ImageTask, config: Config) -> None:
    shown = name[:100]
    field = f"extra.{shown}"
    if name in GenerateBody.model_fields and not (name == _RATE and name in task.arguments):
        raise InvalidRequest(f"{shown} is a field of the request itself; give it there, not in extra.", field=field)
    parameter = task.arguments.get(name)
    if parameter is None:
        known = task.arguments.keys() - (GenerateBody.model_fields.keys() - {_RATE})
        raise InvalidRequest(f"{task.pipeline} has no argument {shown!r}; {near(name, known)}", field=field)
    if not _fits(value, parameter):
        raise InvalidRequest(
            f"{field} must be of type {' or '.join(parameter.types)}, not {_type_of(value)}.", field=field
        )
    if isinstance(value, list):
        _check_list(field, value, parameter)
    _check_numbers(field, value)
    if name == "strength" and isinstance(value, int | float):
        Range(0, 1).check(field, value, field)
    if parameter.maximum is not None:
        allowed = Range(0 if parameter.default == 0 else 1, parameter.maximum)
        for number in _numbers(value):
            allowed.check(field, number, field)
    if name in _SCHEDULES and isinstance(value, list):
        Range(1, config.max_steps).check(f"The length of {field}", len(value), field)


def _check_list(field: str, value: list[Any], parameter: Parameter) -> None:
    if parameter.length is not None and len(value) != parameter.length:
        raise InvalidRequest(f"{field} must have {parameter.length} elements, not {len(value)}.", field=field)
    for index, item in enumerate(value):
        kind = _type_of(item)
        if parameter.items and kind not in parameter.items and not (kind == "int" and "float" in parameter.items):
            raise InvalidRequest(
                f"{field}[{index}] must be of type {' or '.join(parameter.items)}, not {kind}.", field=field
            )


def _check_numbers(field: str, value: Any) -> None:
    """msgpack has numbers that JSON has not, and neither torch nor a message has integers of more than 64 bits."""
    if isinstance(value, list | dict):
        for item in _items(value):
            _check_numbers(field, item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(f"{field} must be finite, not {value}.", field=field)
    elif isinstance(value, int) and not -_BEYOND <= value < _BEYOND:
        raise InvalidRequest(f"{field} must be between {-_BEYOND} and {_BEYOND - 1}, not {value}.", field=field)


def _check_bulk(extra: dict[str, Any]) -> None:
    """Messages are written recursively, and pipelines look at what they get: so neither deep nor many values."""
    level: list[Any] = [extra]
    seen = depth = 0
    while level:
        seen, depth = seen + len(level), depth + 1
        if seen > _EXTRA_VALUES or depth > _EXTRA_DEPTH:
            raise InvalidRequest(
                f"extra may hold between 0 and {_EXTRA_VALUES} values, nested at most {_EXTRA_DEPTH} deep.",
                field="extra",
            )
        level = [item for value in level if isinstance(value, list | dict) for item in _items(value)]


def _numbers(value: Any) -> Iterable[float]:
    return (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int | float))


def _items(value: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _fits(value: Any, parameter: Parameter) -> bool:
    kind = _type_of(value)
    return kind in parameter.types or (kind == "int" and "float" in parameter.types)


def _type_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__
