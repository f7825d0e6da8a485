"""The arguments of a pipeline's ``__call__``: which a request may set, their JSON types and their defaults."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

from diffusers import DiffusionPipeline

from ..protocol.messages import Parameter

_JSON_TYPES: dict[Any, str] = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    list: "list",
    tuple: "list",
    dict: "dict",
    type(None): "null",
}
_OURS = frozenset({"self", "prompt", "generator", "output_type", "return_dict", "latents"})
_OUR_ENDINGS = ("_embeds", "_mask", "_embeddings", "_per_prompt")
"""Arguments that Safelight itself sets, or that are no JSON."""


def call_arguments(pipeline: type[DiffusionPipeline]) -> dict[str, Parameter]:
    """The arguments that a request may set, by name."""
    signature = inspect.signature(pipeline.__call__)
    annotations = _annotations(pipeline)
    found = {}
    for name, parameter in signature.parameters.items():
        if name in _OURS or name.startswith("callback") or name.endswith(_OUR_ENDINGS):
            continue
        json_types = _json_types(annotations.get(name), parameter.default)
        if json_types - {"null"} and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            default = None if parameter.default is inspect.Parameter.empty else parameter.default
            found[name] = Parameter(sorted(json_types), default if _is_json(default) else None)
    return found


def _annotations(pipeline: type[DiffusionPipeline]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(pipeline.__call__)
    except (NameError, TypeError):  # a name that is only imported for type checkers
        return {}


def _json_types(annotation: Any, default: Any) -> set[str]:
    if annotation is None:
        return {_JSON_TYPES[type(default)], "null"} if type(default) in _JSON_TYPES else set()
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_json_types(part, None) for part in typing.get_args(annotation)))
    plain = _JSON_TYPES.get(origin or annotation)
    if plain is None or (plain == "list" and not _holds_json(annotation)):
        return {"null"} if annotation is type(None) else set()
    return {plain} | ({"null"} if default is None and plain != "null" else set())


def _holds_json(annotation: Any) -> bool:
    """Whether a list type's elements can come out of JSON (a list of tensors or pictures cannot)."""
    elements = [part for part in typing.get_args(annotation) if part is not Ellipsis]
    return all(bool(_json_types(element, inspect.Parameter.empty)) or element is Any for element in elements)


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_json(element) for element in value)
    return isinstance(value, str | int | float | bool | None)
