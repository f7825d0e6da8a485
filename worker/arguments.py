"""The arguments of a pipeline's ``__call__``: which a request may set, their JSON types and their defaults."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from ..protocol.replicas import Parameter

_JSON_TYPES: dict[Any, str] = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    list: "list",
    tuple: "list",
    type(None): "null",
}
"""No dictionaries: pipelines hand those on unchecked, to attention processors (which want tensors), to a language
model's ``generate`` (which can be told to run code from a repository) and to ``str.format``.
"""
_SET_BY_US = frozenset({"self", "prompt", "generator", "output_type", "return_dict", "latents", "seed", "image"})
_PATHS = frozenset({"fonts"})  # files of the server that a pipeline would read
_ONE_OUTPUT = frozenset({"batch_size"})  # a request's further outputs are samples with seeds of their own
_NOT_OFFERED = _SET_BY_US | _PATHS | _ONE_OUTPUT
_PROMPTS = re.compile(r"(negative_)?prompt(_\d)?")
_OUR_ENDINGS = ("_embeds", "_mask", "_embeddings", "_per_prompt")
"""Arguments that Safelight itself sets, or that are no JSON."""

_SCHEDULES = frozenset({"timesteps", "sigmas"})


def offered_arguments(pipeline: DiffusionPipeline) -> dict[str, Parameter]:
    """The arguments that a request may set, by name: those of its class that work with its own components."""
    arguments = call_arguments(type(pipeline))
    impossible = _schedules_not_followed(pipeline) | ({"clip_skip"} if _reaches_into_text_model(pipeline) else set())
    return {name: one for name, one in arguments.items() if name not in impossible}


def _schedules_not_followed(pipeline: DiffusionPipeline) -> set[str]:
    """By what diffusers' ``retrieve_timesteps`` asks of the scheduler."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "set_timesteps"):
        return set()
    return set(_SCHEDULES - inspect.signature(scheduler.set_timesteps).parameters.keys())


def _reaches_into_text_model(pipeline: DiffusionPipeline) -> bool:
    """Whether prompts are encoded by the ``text_model`` of a text encoder that has none, as in transformers 5."""
    encode, encoder = getattr(type(pipeline), "encode_prompt", None), getattr(pipeline, "text_encoder", None)
    names = inspect.unwrap(encode).__code__.co_names if encode is not None else ()
    return "text_model" in names and encoder is not None and not hasattr(encoder, "text_model")


def call_arguments(pipeline: type[DiffusionPipeline]) -> dict[str, Parameter]:
    """The arguments that a request may set with pipelines of this class, by name."""
    signature = inspect.signature(pipeline.__call__)
    annotations = _annotations(pipeline)
    found = {}
    for name, parameter in signature.parameters.items():
        if name in _NOT_OFFERED or "callback" in name or name.endswith(_OUR_ENDINGS):
            continue
        annotation, default = annotations.get(name), parameter.default
        json_types = _json_types(annotation, default)
        if _PROMPTS.fullmatch(name):
            json_types -= {"list"}  # which would have one for each prompt, and a call is for one
        if json_types - {"null"} and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            found[name] = Parameter(
                sorted(json_types),
                default if default is not inspect.Parameter.empty and _is_json(default) else None,
                items=_items(annotation) if "list" in json_types else [],
                length=_length(annotation, default),
                is_tuple=_is_tuple(annotation, default),
            )
    return found


def as_declared(arguments: Mapping[str, Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with a tuple for each list whose argument is one: pipelines add tuples up, which fails for a list."""
    tuples = {name for name, value in given.items() if name in arguments and arguments[name].is_tuple}
    return {name: tuple(v) if name in tuples and isinstance(v, list) else v for name, v in given.items()}


def _annotations(pipeline: type[DiffusionPipeline]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(pipeline.__call__)
    except (NameError, TypeError):  # a name that is only imported for type checkers
        return {}


def _json_types(annotation: Any, default: Any) -> set[str]:
    if annotation is None:
        return {_JSON_TYPES[type(default)], "null"} if type(default) in _JSON_TYPES else set()
    plain = _JSON_TYPES.get(typing.get_origin(annotation) or annotation)
    if _is_union(annotation):
        return set().union(*(_json_types(part, None) for part in typing.get_args(annotation)))
    if plain is None or (plain == "list" and not _holds_json(annotation, default)):
        return {"null"} if annotation is type(None) else set()
    return {plain} | ({"null"} if default is None and plain != "null" else set())


def _holds_json(annotation: Any, default: Any) -> bool:
    """Whether a list type's elements can come out of JSON (a list of tensors or pictures cannot)."""
    elements = [part for part in typing.get_args(annotation) if part is not Ellipsis]
    if not elements:
        return isinstance(default, list | tuple) and _is_json(default)
    return all(bool(_json_types(element, inspect.Parameter.empty)) or element is Any for element in elements)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _parts(annotation: Any) -> list[Any]:
    """The types that ``annotation`` allows."""
    return list(typing.get_args(annotation)) if _is_union(annotation) else [annotation]


def _sequences(annotation: Any, *kinds: type) -> list[Any]:
    return [part for part in _parts(annotation) if (typing.get_origin(part) or part) in kinds]


def _items(annotation: Any) -> list[str]:
    """The JSON types of a list's elements, where they are declared.

    "float" for any number: some pipelines declare ``list[int]`` for timesteps, which are fractions in a flow.
    """
    declared = [typing.get_args(sequence) for sequence in _sequences(annotation, list, tuple)]
    if not all(declared):
        return []
    elements = [element for args in declared for element in args if element is not Ellipsis]
    if Any in elements:
        return []
    found = set().union(*(_json_types(element, inspect.Parameter.empty) for element in elements))
    return sorted({"float" if kind == "int" else kind for kind in found})


def _length(annotation: Any, default: Any) -> int | None:
    """The only length that a list may have. ``tuple[int]`` is written for tuples of any length."""
    sequences = _sequences(annotation, list, tuple)
    args = typing.get_args(sequences[0]) if len(sequences) == 1 and _is_tuple(annotation, default) else ()
    return len(args) if len(args) > 1 and Ellipsis not in args else None


def _is_tuple(annotation: Any, default: Any) -> bool:
    if annotation is None:
        return isinstance(default, tuple)
    return bool(_sequences(annotation, tuple)) and not _sequences(annotation, list)


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_json(element) for element in value)
    return isinstance(value, str | int | float | bool | None)
