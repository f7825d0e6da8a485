"""Options that commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from .endpoint import DEFAULT_URL

Url = Annotated[
    str | None, typer.Option(envvar="SAFELIGHT_URL", help=f"Where the server is; {DEFAULT_URL} when not given.")
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="SAFELIGHT_API_KEY", show_envvar=True, help="The key that the server asks for.")
]
