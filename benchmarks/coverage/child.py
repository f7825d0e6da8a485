"""One examination in a process of its own, so that a crash or a hang is a row and not the end."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import msgspec
import torch

from safelight.protocol.errors import SafelightError

from .catalogue import kind
from .examination import Examination
from .parts import NoForm
from .row import Row
from .service import RequestFailed

PLAIN_CALLS = 200
"""Calls of plain diffusers that an examination may take as long as: it makes about 60, of up to twice the size."""


class Noted(msgspec.Struct):
    """How far an examination has come; ``plain_s`` is how long plain diffusers took for a call, once that is known."""

    row: Row
    plain_s: float = 0.0


def examined(name: str, scratch: Path, timeout_s: float) -> Row:
    """The row of pipeline ``name``; its checkpoint lies in ``scratch`` meanwhile, and its log stays there.

    After ``timeout_s`` the examination goes on for as long as plain diffusers has needed for ``PLAIN_CALLS`` calls in
    the same process.
    """
    answer = scratch / f"{name}.json"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preloaded"])
    process = context.Process(target=_examine, args=(name, scratch, answer))
    process.start()
    process.join(timeout_s)
    process.join(PLAIN_CALLS * _noted(answer, name).plain_s)
    is_alive, noted = process.is_alive(), _noted(answer, name)
    row = noted.row
    if is_alive:
        process.kill()
        process.join()
        row.reason = f"took longer than {timeout_s:.0f} s and {PLAIN_CALLS} calls of {noted.plain_s:.1f} s"
    elif process.exitcode:
        row.reason = f"its process ended with {process.exitcode}"
    shutil.rmtree(scratch / name, ignore_errors=True)
    answer.unlink(missing_ok=True)
    return row


def _noted(answer: Path, name: str) -> Noted:
    return msgspec.json.decode(answer.read_bytes(), type=Noted) if answer.exists() else Noted(Row(name, kind(name)))


def _examine(name: str, scratch: Path, answer: Path) -> None:
    """The child's life: its output goes to a log, its findings to ``answer``."""
    log = (scratch / f"{name}.log").open("w")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    row = Row(name, kind(name))
    try:
        Examination(row, scratch, lambda plain_s: _note(Noted(row, plain_s), answer)).run()
    except Exception as error:
        logging.getLogger(__name__).exception("%s ended at %s", name, row.stage)
        whose = "" if isinstance(error, SafelightError | NoForm | RequestFailed) else f"{type(error).__name__}: "
        row.reason = whose + " ".join(str(error).split())
    _note(Noted(row), answer)


def _note(noted: Noted, answer: Path) -> None:
    """Whole or not at all: the parent may read at any time."""
    beside = answer.with_suffix(".new")
    beside.write_bytes(msgspec.json.encode(noted))
    beside.replace(answer)
