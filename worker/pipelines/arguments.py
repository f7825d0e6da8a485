"""The arguments of a pipeline's ``__call__`` that a request may set, with their JSON types and defaults."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from ...protocol.replicas import Parameter

_JSON_TYPES: dict[Any, str] = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    list: "list",
    tuple: "list",
    type(None): "null",
}
"""Dictionaries are excluded, because pipelines pass them on unchecked: to attention processors (which need tensors), to
a language model's ``generate`` (which can be made to run code from a repository) and to ``str.format``.
"""
_SET_BY_US = frozenset({"self", "prompt", "generator", "output_type", "return_dict", "latents", "seed", "image"})
_PATHS = frozenset({"fonts"})  # files of the server that a pipeline would read
_ONE_OUTPUT = frozenset({"batch_size"})  # each further output of a request is a sample with its own seed
_NOT_OFFERED = _SET_BY_US | _PATHS | _ONE_OUTPUT
_PROMPTS = re.compile(r"(negative_)?prompt(_\d)?")
_OUR_ENDINGS = ("_embeds", "_mask", "_embeddings", "_per_prompt")
"""Endings of arguments that Safelight sets itself or that are not JSON."""

_SCHEDULES = frozenset({"timesteps", "sigmas"})


def offered_arguments(pipeline: DiffusionPipeline) -> dict[str, Parameter]:
    """The arguments that a request may set, by name: its class's, except those that its components do not support."""
    arguments = call_arguments(type(pipeline))
    impossible = _schedules_not_followed(pipeline) | ({"clip_skip"} if _reaches_into_text_model(pipeline) else set())
    return {name: one for name, one in arguments.items() if name not in impossible}


def _schedules_not_followed(pipeline: DiffusionPipeline) -> set[str]:
    """The schedule arguments that diffusers' ``retrieve_timesteps`` would refuse for this scheduler."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "set_timesteps"):
        return set()
    return set(_SCHEDULES - inspect.signature(scheduler.set_timesteps).parameters.keys())


def _reaches_into_text_model(pipeline: DiffusionPipeline) -> bool:
    """True if the pipeline reads its text encoder's ``text_model``, which does not exist in transformers 5."""
    encode, encoder = getattr(type(pipeline), "encode_prompt", None), getattr(pipeline, "text_encoder", None)
    names = inspect.unwrap(encode).__code__.co_names if encode is not None else ()
    return "text_model" in names and encoder is not None and not hasattr(encoder, "text_model")


def call_arguments(pipeline: type[DiffusionPipeline]) -> dict[str, Parameter]:
    """The arguments of this class that a request may set, by name."""
    signature = inspect.signature(pipeline.__call__)
    annotations = _annotations(pipeline)
    found = {}
    for name, parameter in signature.parameters.items():
        if name in _NOT_OFFERED or "callback" in name or name.endswith(_OUR_ENDINGS):
            continue
        annotation, default = annotations.get(name), parameter.default
        json_types = _json_types(annotation, default)
        if _PROMPTS.fullmatch(name):
            json_types -= {"list"}  # one element per prompt, and each call has one prompt
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
    """``given`` with lists turned into tuples where the argument is a tuple, because pipelines concatenate those."""
    tuples = {name for name, value in given.items() if name in arguments and arguments[name].is_tuple}
    return {name: tuple(v) if name in tuples and isinstance(v, list) else v for name, v in given.items()}


def _annotations(pipeline: type[DiffusionPipeline]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(pipeline.__call__)
    except (NameError, TypeError):  # a name is imported for type checkers only
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
    """True if a list type's elements can be JSON (those of a list of tensors or pictures cannot)."""
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
    """The declared JSON types of a list's elements, or an empty list.

    Numbers are "float": some pipelines declare ``list[int]`` for timesteps, which are fractions in a flow.
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
    """The required length of a list, if any; diffusers declares ``tuple[int]`` for tuples of any length."""
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
