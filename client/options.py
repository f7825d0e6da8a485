"""Options shared by commands, and options generated from the table of request fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from ..protocol.fields import TABLE, Row
from .endpoint import DEFAULT_URL

F = TypeVar("F", bound=Callable[..., Any])

Url = Annotated[
    str | None, typer.Option(envvar="SAFELIGHT_URL", help=f"The server's address, by default {DEFAULT_URL}.")
]
ApiKey = Annotated[str | None, typer.Option(envvar="SAFELIGHT_API_KEY", show_envvar=True, help="The server's API key.")]

PREVIEW_EVERY = 2
"""Steps between two previews of ``--preview``."""

Prompts = Annotated[list[str], typer.Argument(help="The prompt; several make one result each.", show_default=False)]
OutputFile = Annotated[
    Path,
    typer.Option("--output", "-o", help="The file to write; its suffix sets the format. Several outputs: out-0.png, …"),
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="The model to serve; a running server must have this one.")
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(help="By default a random seed, which is printed; repeat for one of each prompt or output."),
]
Count = Annotated[int, typer.Option("-n", min=1, help="Outputs of each prompt, with consecutive seeds.")]
Images = Annotated[
    list[Path] | None,
    typer.Option(exists=True, dir_okay=False, help="An input picture; repeat for models that take several."),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[=SCALE]", help="A loaded adapter for this request; may be given several times."),
]
Extras = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=JSON", help="A further argument of the pipeline; may be given several times."),
]
Preview = Annotated[bool, typer.Option("--preview", help="Show the picture in the terminal as it forms.")]
PreviewEvery = Annotated[
    int | None, typer.Option(min=1, help=f"With --preview, the steps between two pictures; {PREVIEW_EVERY} otherwise.")
]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for the server's next bytes.")]


def takes_fields(command: F) -> F:
    """Give ``command``, which takes ``**settings``, an option for each request field that it does not have itself."""
    signature = inspect.signature(command, eval_str=True)
    *own, _ = signature.parameters.values()
    fields = [_option(row) for row in TABLE.values() if row.alias not in signature.parameters]
    vars(command)["__signature__"] = signature.replace(parameters=[*own, *fields])
    return command


def _option(row: Row) -> inspect.Parameter:
    option = typer.Option(row.default, f"--{row.alias.replace('_', '-')}", help=f"{row.field.help}.")
    kind = str | None if str in get_args(row.type) else row.type  # the server reads a number from its text
    return inspect.Parameter(row.alias, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)
