"""The stages of an unattended run: what each has found is written at once, and each has its time and no more."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from safelight.benchmarks.gpu_goals import RATIOS, goal, ratios
from safelight.benchmarks.machine import describe

Figures = Iterator[dict[str, Any]]
"""The figures of a stage, in parts, each as soon as it is measured."""

LONGEST = 3
"""A stage is stopped when it has taken this many times what it usually needs."""

_LAST_CHARACTERS = 3000


class TooLong(BaseException):
    """A stage has taken all the time that it had. No ``except Exception`` of a library takes it for its own failure."""


class Run:
    """The stages of one run, their results, and the time that is left for them."""

    def __init__(self, minutes: float, results: Path, options: dict[str, Any]) -> None:
        self._ends = time.monotonic() + 60 * minutes
        self._results = results
        self.found: dict[str, Any] = {"machine": describe(), "options": options, "models": {}, RATIOS: {}}

    def stage(self, model: str, name: str, needs_s: float, measure: Callable[[], Figures]) -> bool:
        """Run one stage and keep what it finds, also if it fails later; false if it failed or was skipped."""
        stages = self.found["models"].setdefault(model, {})
        figures = stages[name] = dict[str, Any]()
        left_s, began = self._ends - time.monotonic(), time.monotonic()
        if left_s < needs_s:
            figures["skipped"] = f"needs about {needs_s:.0f} s, and {max(0.0, left_s):.0f} were left"
        else:
            try:
                with _ended_after(min(left_s, LONGEST * needs_s)):
                    for found in measure():
                        figures |= found
                        self._write()
            except (Exception, TooLong) as error:  # noqa: BLE001  # nobody is there, and other stages are worth having
                figures["error"] = f"{type(error).__name__}: {error}"
                figures["traceback"] = "".join(traceback.format_tb(error.__traceback__))[-_LAST_CHARACTERS:]
                figures["notes"] = list(vars(error).get("__notes__", ()))
        figures["stage_s"] = round(time.monotonic() - began, 2)
        print(model, name, json.dumps(figures), flush=True)
        self._write()
        return "error" not in figures and "skipped" not in figures

    def _write(self) -> None:
        self.found[RATIOS] = {model: ratios(stages) for model, stages in self.found["models"].items()}
        self._results.mkdir(parents=True, exist_ok=True)
        for name, text in (("gpu.json", json.dumps(self.found, indent=2) + "\n"), ("gpu.md", table(self.found))):
            written = self._results / f"{name}.new"
            written.write_text(text)
            written.replace(self._results / name)  # a run that is killed leaves the figures before or those after


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Raise ``TooLong`` in the main thread, which this must be, if the context lasts longer."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"it has taken {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(found: dict[str, Any]) -> str:
    """The results as Markdown: one row for each figure of each stage, and for each ratio; goals are for a GPU."""
    lines = [
        f"Machine: {json.dumps(found['machine'])}",
        "",
        "| model | stage | figure | value | goal |",
        "|---|---|---|---|---|",
    ]
    for model, stages in found["models"].items():
        for stage, figures in {**stages, RATIOS: found[RATIOS][model]}.items():
            for name, value in figures.items():
                if name not in ("traceback", "notes"):
                    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
                    wanted = "" if found["options"].get("dry") else goal(model, stage, name)
                    lines.append(f"| {model} | {stage} | {name} | {shown.replace('|', '/')} | {wanted} |")
    return "\n".join(lines) + "\n"
