"""Draws the curves of one or several runs: `python -m safelight.examples.flow_grpo.plot curve.png RUN/log.jsonl …`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


def plot(logs: Sequence[Path], png: Path) -> None:
    """The held-out score in percent over minutes, and behind it the training's own rewards."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, log in enumerate(logs):
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        scores = [(line["minutes"], 100 * line["held_out"]) for line in lines if "held_out" in line]
        rewards = [(line["minutes"], 100 * line["reward"]) for line in lines if "reward" in line]
        colour = f"C{number}"
        axes.plot(*zip(*scores, strict=True), marker="o", color=colour, label=log.parent.name)
        axes.plot(*zip(*rewards, strict=True), color=colour, linewidth=0.5, alpha=0.6)
    axes.set(
        xlabel="minutes",
        ylabel="right attributes of held-out pictures, %",
        title="thin: mean reward in training, × 100",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=110)


if __name__ == "__main__":
    plot([Path(name) for name in sys.argv[2:]], Path(sys.argv[1]))
