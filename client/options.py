"""Options shared by commands, and options generated from the table of request fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from ..protocol.fields import TABLE, Row
from .endpoint import DEFAULT_URL

F = TypeVar("F", bound=Callable[..., Any])

Url = Annotated[
    str | None, typer.Option(envvar="SAFELIGHT_URL", help=f"The server's address, by default {DEFAULT_URL}.")
]
ApiKey = Annotated[str | None, typer.Option(envvar="SAFELIGHT_API_KEY", show_envvar=True, help="The server's API key.")]


def takes_fields(command: F) -> F:
    """Give ``command``, which takes ``**settings``, an option for each request field that is marked as a flag."""
    signature = inspect.signature(command, eval_str=True)
    *own, _ = signature.parameters.values()
    fields = [_option(row) for row in TABLE.values() if row.field.flag]
    vars(command)["__signature__"] = signature.replace(parameters=[*own, *fields])
    return command


def _option(row: Row) -> inspect.Parameter:
    option = typer.Option(row.default, f"--{row.alias.replace('_', '-')}", help=f"{row.field.help}.")
    return inspect.Parameter(row.alias, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=row.type)
