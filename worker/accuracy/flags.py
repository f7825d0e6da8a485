"""The command line of ``safelight verify``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .policy import POLICY
from .task import DTYPES, VerificationTask


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags as attributes. Raises ``SystemExit``, with status 2 for invalid flags and 0 for ``--help``."""
    return make_parser().parse_args(arguments)


def task_of(flags: argparse.Namespace, directory: str) -> VerificationTask:
    """The task of the flags; its processes write their files to ``directory``."""
    return VerificationTask(
        model=flags.model,
        directory=directory,
        policy=str(flags.policy),
        dtypes=list(dict.fromkeys(flags.dtype or DTYPES)),
        components=flags.component,
        tp=flags.tp,
        fused=flags.fuse_projections,
        device=flags.device,
        staged=flags.staged,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="safelight verify",
        description="Compare each component of MODEL, as a replica loads and shards it, with the one that diffusers "
        "or transformers load from the same files. Prints a table. The exit status is 0 if all are close enough, 1 if "
        "not, and 2 if the comparison was not possible.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory with a diffusers pipeline, a hub id, or `shapes`")
    add("--tp", type=_ranks, default=1, metavar="N", help="tensor-parallel ranks (default: 1)")
    add("--fuse-projections", action="store_true", help="with fused projections, as a server with this flag has them")
    add("--dtype", action="append", choices=DTYPES, help="only in this precision; may be given several times")
    add("--component", action="append", default=[], metavar="NAME", help="only this one; may be given several times")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    add("--json", action="store_true", help="print JSON")
    add("--report", type=Path, metavar="DIR", help="also write accuracy.md and accuracy.json into this folder")
    add("--policy", type=Path, default=POLICY, metavar="FILE", help="thresholds and skips, in place of Safelight's own")
    add(
        "--staged",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one side at a time in memory (default: where both would not fit)",
    )
    return parser


def _ranks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 64")
    return int(text)
