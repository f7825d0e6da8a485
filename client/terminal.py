"""Terminal output: progress bars of requests and uploads, previews, the table of ``safelight info``, errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

from rich.color import Color
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table

from . import results

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_COLUMNS = 48


def standard_error() -> Console:
    """The console for everything but results, which go to standard output."""
    return Console(stderr=True)


def complain(error: Exception) -> None:
    standard_error().print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)


class GenerationView:
    """A context that shows the events of a request for ``outputs`` outputs, and clears its lines on exit."""

    def __init__(self, console: Console, outputs: int) -> None:
        self._outputs = outputs
        self._done: dict[int, int] = {}
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._bar.add_task("asking", total=None)
        self._live = Live(self._bar, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, event: results.Event) -> None:
        match event:
            case results.Queued(position=position):
                self._bar.update(self._task, description=f"waiting behind {position}" if position else "starting")
            case results.Progress(output=output, step=step, steps=steps):
                self._done[output] = step
                self._bar.update(
                    self._task,
                    description="drawing",
                    completed=sum(self._done.values()),
                    total=steps * self._outputs,
                )
            case results.Preview(output=0) if self._live:
                self._live.update(Group(blocks(event.image), self._bar))


class PushView:
    """A context that shows the upload of each of ``modules`` as a bar, and clears its lines on exit."""

    def __init__(self, console: Console, modules: Iterable[str]) -> None:
        self._bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks = {module: self._bars.add_task(module, total=None) for module in modules}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, module: str, progress: results.UpdateProgress) -> None:
        self._bars.update(self._tasks[module], completed=progress.sent, total=progress.total)


def blocks(picture: Image, columns: int = PICTURE_COLUMNS) -> Segments:
    """``picture`` as half blocks: each character shows two pixels, one above the other."""
    rows = max(1, round(columns * picture.height / picture.width / 2))
    small = picture.convert("RGB").resize((columns, 2 * rows))
    segments = []
    for y in range(0, 2 * rows, 2):
        for x in range(columns):
            above, below = (_colour(small.getpixel((x, y + half))) for half in (0, 1))
            segments.append(Segment("▀", Style(color=above, bgcolor=below)))
        segments.append(Segment.line())
    return Segments(segments)


def _colour(pixel: Any) -> Color:  # Any: Pillow's pixel may be of any mode; this one is RGB
    return Color.from_rgb(*pixel)


def server_table(url: str, info: dict[str, Any]) -> Table:
    """``/server_info`` as a table for people."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("server", f"{url}, version {info['version']}, up {info['uptime_s']:.0f} s")
    for model in info["models"]:
        size = sum(model["parameters"].values()) / 1e6
        table.add_row("model", f"{model['model']} ({model['pipeline']}, {size:,.1f} M parameters)")
        table.add_row("runs on", f"{model['device']}, {model['dtype']}")
        table.add_row("draws", f"{_defaults(model)} by default")
        table.add_row("weights", model["weight_version"])
    for component, adapters in info.get("adapters", {}).items():
        table.add_row("adapters", f"{component}: {', '.join(map(_adapter, adapters))}")
    if batching := info["batching"]:
        table.add_row("batching", f"{batching['mode']}: {batching['reason']}")
    table.add_row("queue", f"{info['queued']} waiting, {info['running']} running")
    for replica in info["replicas"]:
        table.add_row(f"replica {replica['replica']}", _replica(replica))
    return table


def _defaults(model: dict[str, Any]) -> str:
    """The defaults of a request; older servers do not report all of them."""
    parts = [f"{model['default_width']}x{model['default_height']}"]
    if frames := model.get("default_num_frames"):
        parts.append(f"{frames} frames at {model['default_fps']} a second")
    arguments = model.get("arguments", {})
    for name, words in (("num_inference_steps", "steps"), ("max_sequence_length", "tokens of text")):
        if (value := arguments.get(name, {}).get("default")) is not None:
            parts.append(f"{value} {words}")
    defaults = ", ".join(parts)
    if plain := model.get("deterministic_defaults"):
        defaults += f" ({', '.join(f'{name} {value}' for name, value in plain.items())} if deterministic)"
    return defaults


def _adapter(adapter: dict[str, Any]) -> str:
    state = "dynamic" if adapter["mode"] == "dynamic" else "merged" if adapter["merged"] else "taken out"
    return f"{adapter['nickname']} ({state}, strength {adapter['strength']:g})"


def _replica(replica: dict[str, Any]) -> str:
    stats = replica["stats"]
    text = f"{replica['state']}, {replica['outstanding']} requests, {stats['outputs']} outputs made"
    if stats["forwards"]:
        text += f", {stats['calls'] / stats['forwards']:.1f} calls a forward"
    if stats.get("unmergeable"):
        text += f"; alone run {', '.join(sorted(stats['unmergeable']))}"
    return text if replica["state"] == "ready" else f"{text}: {replica['message']}"
