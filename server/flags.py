"""The command line of the server: one flag for each option, made from the options themselves."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from ..process.configuration import Option, load_config, options
from ..protocol.config import Config
from ..protocol.errors import StartFailed
from .allowed_callers import allowed_hosts, allowed_origins
from .api_key import with_key


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartFailed(f"The command line cannot be read: {message}; see `{self.prog} --help`.")


def read_config(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """The configuration from the command line over ``environment`` over the file that ``--config`` names.

    Raises ``StartFailed`` that names the flag or the value; ``SystemExit`` for ``--help``.
    """
    given = vars(make_parser().parse_args(arguments))
    file: Path | None = given.pop("config", None)
    if (positional := given.pop("MODEL", None)) is not None:
        if "model" in given:
            raise StartFailed(f"The model is given twice, as {positional!r} and with --model; leave one of them out.")
        given["model"] = positional
    config = load_config(given, environment, file)
    allowed_hosts(config)  # report invalid ones now, at the start
    allowed_origins(config)
    return with_key(config)


def make_parser() -> argparse.ArgumentParser:
    """A parser whose namespace holds just the flags that were given."""
    parser = _Parser(
        prog="python -m safelight.server",
        description="Serve a diffusion model over HTTP.",
        epilog="Every flag can also be set as an environment variable, SAFELIGHT_ and its name in capitals, "
        "or in the file that --config names. A flag wins over the environment, and that over the file.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("MODEL", nargs="?", help="the same as --model")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with options")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in options():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add_flag(groups[option.group], option)
    return parser


def _add_flag(group: argparse._ArgumentGroup, option: Option) -> None:
    annotation = option.annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):  # with None
        annotation = typing.get_args(annotation)[0]
    default = "" if option.default is None else f" (default: {option.default})"
    help_text = (option.description + default).replace("%", "%%")
    if annotation is bool:
        group.add_argument(option.flag, dest=option.name, action=argparse.BooleanOptionalAction, help=help_text)
    elif typing.get_origin(annotation) is Literal:
        group.add_argument(option.flag, dest=option.name, choices=typing.get_args(annotation), help=help_text)
    else:
        metavar = {int: "N", float: "X"}.get(annotation, "TEXT")
        group.add_argument(option.flag, dest=option.name, metavar=metavar, help=help_text)
