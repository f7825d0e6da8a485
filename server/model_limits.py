"""Check a request against the limits of the server's model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..protocol.config import Config, most_pixels
from ..protocol.errors import InvalidRequest
from ..protocol.fields import ARGUMENTS, TABLE, Settings
from ..protocol.output_formats import formats_of
from ..protocol.replicas import ImageTask, ModelInfo, Parameter
from .body_validation import near
from .request_validation import Range
from .schemas import GenerateBody

_BEYOND = 2**63
_SIDES = ("width", "height")
_RATE = "fps"  # the request's is the rate at which the clip plays; a pipeline's argument conditions its model
_EXTRA_VALUES = 10_000
_EXTRA_DEPTH = 32
_SCHEDULES = ("timesteps", "sigmas")  # arguments whose length is a number of steps


def check_model(body: GenerateBody, images: int, model: ModelInfo, config: Config) -> None:
    """Raise ``InvalidRequest`` for what this model cannot do with so many images."""
    task = _task(images, model)
    resizes = images > 0 and "strength" in task.arguments  # what is drawn over can have any size
    for name in ARGUMENTS:
        if getattr(body, name) is not None and name not in task.arguments and not (resizes and name in _SIDES):
            raise InvalidRequest(f"{task.pipeline} does not take {name}; leave it out.", field=name)
    for name in (row.name for row in TABLE.values() if row.field.taken_by == "video"):
        if getattr(body, name) is not None and "num_frames" not in model.arguments:
            raise InvalidRequest(
                f"{model.pipeline} makes no videos, so it does not take {name}; leave it out.", field=name
            )
    _check_size(body.settings, model, task.size_multiple, config)
    if body.settings.preview_every and not task.supports_preview:
        raise InvalidRequest(
            f"Previews are not available for {task.pipeline}; preview_every must be 0.", field="preview_every"
        )
    if body.output_format is not None and body.output_format not in formats_of(model.kind):
        raise InvalidRequest(
            f"output_format must be one of {', '.join(formats_of(model.kind))} for a model that makes {model.kind}s.",
            field="output_format",
        )
    _check_required(body, task)
    _check_bulk(body.settings.extra)
    for name, value in body.settings.extra.items():
        _check_extra(name, value, task, config)


def _check_required(body: GenerateBody, task: ModelInfo | ImageTask) -> None:
    for name in (name for name, argument in task.arguments.items() if argument.is_required):
        given = getattr(body, name) if name in ARGUMENTS else body.settings.extra.get(name)
        if given is None:
            field = name if name in ARGUMENTS else f"extra.{name}"
            raise InvalidRequest(f"{task.pipeline} does not run without {name}; give {field}.", field=field)


def _task(images: int, model: ModelInfo) -> ModelInfo | ImageTask:
    """The task for this number of images: ``ModelInfo`` and ``ImageTask`` share the attributes used here."""
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


def _check_size(asked: Settings, model: ModelInfo, multiple: int, config: Config) -> None:
    most = most_pixels(config, model.default_width, model.default_height)
    for name, value in (("width", asked.width), ("height", asked.height)):
        if value is not None and (value < multiple or value % multiple):
            raise InvalidRequest(
                f"{name} must be a multiple of {multiple} between {multiple} and {most // multiple}, not {value}.",
                field=name,
            )
    if asked.width is None and asked.height is None:
        return  # what the model makes by itself is not the request's doing
    usual = {"width": model.default_width, "height": model.default_height}
    if asked.deterministic:
        usual |= {side: model.deterministic_defaults.get(side, usual[side]) for side in _SIDES}
    width, height = asked.width or usual["width"] or multiple, asked.height or usual["height"] or multiple
    if width * height > most:
        raise InvalidRequest(
            f"width x height must be between {multiple * multiple} and {most} pixels; "
            f"{width} x {height} are {width * height}.",
            field="width" if asked.width else "height",
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
