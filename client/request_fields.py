"""The fields of :class:`.fields.Settings` as arguments of Python functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..protocol.errors import InvalidRequest
from ..protocol.fields import TABLE

F = TypeVar("F", bound=Callable[..., Any])


def by_table(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split ``arguments`` into request fields, under the fields' own names, and the rest.

    Fields that are ``None`` are dropped. Raises ``InvalidRequest`` for a field given under both of its names.
    """
    fields: dict[str, Any] = {}
    further = dict(arguments)
    for row in TABLE.values():
        values = [further.pop(name, None) for name in {row.name, row.alias}]
        given = [value for value in values if value is not None]
        if len(given) > 1:
            raise InvalidRequest(
                f"`{row.alias}` and `{row.name}` are the same field: give one of them.", field=row.alias
            )
        if given:
            fields[row.name] = given[0]
    return fields, further


def shows_fields(function: F) -> F:
    """Show the table's fields in the signature of ``function``, which takes them as ``**arguments``."""
    signature = inspect.signature(function)
    *own, further = signature.parameters.values()
    fields = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=row.type | None)
        for row in TABLE.values()
        for name in dict.fromkeys((row.alias, row.name))
        if name not in signature.parameters
    ]
    vars(function)["__signature__"] = signature.replace(parameters=[*own, *fields, further])
    return function
