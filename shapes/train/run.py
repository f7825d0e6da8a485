"""Settings, learning rate, checkpoints and progress, shared by all stages of training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 15.0
"""How often a log file gets a line of progress."""


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: where it writes, on which device, from which seed."""

    out: Path
    device: torch.device
    seed: int

    def generator(self, stage: str, step: int) -> torch.Generator:
        """The random numbers of one step, the same however often the run was interrupted before it."""
        salt = sum(ord(letter) for letter in stage)
        return torch.Generator().manual_seed((self.seed * 1009 + salt) * 10_000_019 + step)

    def checkpoint(self, stage: str) -> Path:
        return self.out / f"{stage}.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint at `path`, or None where there is none. Tensors and plain containers only."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def one_cycle(step: int, steps: int, warmup: float = 0.04, flat: float = 0.3) -> float:
    """Factor on the learning rate: a linear rise, a plateau until `flat` of the run, then half a cosine to zero."""
    done = (step + 1) / steps
    if done < warmup:
        return done / warmup
    if done < flat:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - flat) / (1 - flat)))


class Report:
    """Progress of a stage: a live bar on a terminal, a line every `LINE_SECONDS` in a log file."""

    def __init__(self, stage: str, start: int, steps: int) -> None:
        self._stage, self._start, self._steps = stage, start, steps
        self._console = Console()
        self._began = self._last_line = time.monotonic()
        columns = (
            TextColumn(stage),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=steps, completed=start)

    def steps(self) -> Iterator[int]:
        """The step numbers still to do."""
        with self._bar:
            yield from range(self._start, self._steps)

    def update(self, step: int, **values: float) -> None:
        text = " ".join(f"{name} {value:.4f}" for name, value in values.items())
        self._bar.update(self._task, completed=step + 1, description=text)
        now = time.monotonic()
        if self._console.is_terminal or (now - self._last_line < LINE_SECONDS and step + 1 < self._steps):
            return
        self._last_line = now
        pace = (now - self._began) / (step + 1 - self._start)
        left = pace * (self._steps - step - 1)
        print(f"{self._stage} {step + 1}/{self._steps} {text} | {pace:.2f} s/step, {left:.0f} s left", flush=True)

    def note(self, text: str) -> None:
        """One line that stays, above the bar or in the log."""
        self._console.print(text, highlight=False, soft_wrap=True)
