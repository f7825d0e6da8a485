"""The findings as JSON, and as a page of the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from .row import AMPLIFIED, Row

KINDS = ("text-to-image", "text-to-video", "image-to-image", "image-to-video")
STAGES = {
    "left out": "",
    "build": "no tiny form: ",
    "diffusers": "plain diffusers does not run the tiny form: ",
    "load": "",
    "serve": "",
    "done": "",
}
"""The words before a reason, by the last stage that a pipeline reached."""

LONGEST_REASON = 200


class Findings(msgspec.Struct):
    """All rows, and the machine and libraries that they were found on."""

    machine: dict[str, Any]
    libraries: dict[str, str]
    rows: dict[str, Row]


def read(file: Path) -> Findings:
    """The findings in ``file``; none when there is no such file."""
    return msgspec.json.decode(file.read_bytes(), type=Findings) if file.exists() else Findings({}, {}, {})


def write(findings: Findings, file: Path) -> None:
    """Write the findings, one row a line's block, in the order of their names."""
    ordered = Findings(findings.machine, findings.libraries, dict(sorted(findings.rows.items())))
    file.write_bytes(msgspec.json.format(msgspec.json.encode(ordered), indent=1) + b"\n")


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """How many pipelines came how far."""
    tried = [row for row in rows if row.stage != "left out"]
    return {
        "tried": len(tried),
        "run by plain diffusers": sum(row.stage in ("serve", "done") for row in tried),
        "served": sum(row.served for row in tried),
        "served, and bitwise": sum(row.served and row.bitwise for row in tried),
        "merged": sum(row.merged for row in tried),
        "tensor-parallel": sum(row.parallel == "yes" or row.parallel.startswith(AMPLIFIED) for row in tried),
    }


def line(row: Row) -> str:
    """One line of progress."""
    met = f"{row.calls} calls in {row.forwards} forwards" if row.mode == "merged" else row.mode
    words = (row.pipeline, row.stage, "bitwise" if row.bitwise else "", met, row.parallel, row.reason)
    return " · ".join(word for word in words if word)


def page(findings: Findings) -> str:
    """The documentation's page."""
    rows = list(findings.rows.values())
    parts = [HEAD.format(**findings.libraries), _summary(rows)]
    parts += [_table(kind, [row for row in rows if row.kind == kind and row.stage != "left out"]) for kind in KINDS]
    parts.append(_left_out([row for row in rows if row.stage == "left out"]))
    return "\n".join(parts)


HEAD = """# Models

Which pipelines of diffusers Safelight serves, and how, for anybody who chooses a model. To see it for a checkpoint of
yours, start it (`safelight serve MODEL`) and read `GET /server_info`.

`python -m safelight.benchmarks.coverage` makes this page. For each pipeline class that diffusers exports, it builds a
tiny form with random weights where one can be made, loads it as any checkpoint is loaded, lets the self-test choose how
requests share forwards, serves requests, and compares their outputs with plain `DiffusionPipeline` calls.
Versions: diffusers {diffusers}, transformers {transformers}, torch {torch}, ftfy {ftfy}.

| column | means |
|---|---|
| served | requests give files, by the same code that a worker runs |
| bitwise | a request with `deterministic`, among others, gives exactly the numbers of plain diffusers |
| merged | three different requests shared forwards, and no value differs by more than 1e-4 from plain diffusers |
| tensor-parallel | two ranks give the same, within 1e-4, or within 1e-6 where both compute in float64 |

Where two ranks give the same in float64, *rounding makes* says how far they differ in float32. Such a pipeline
amplifies rounding; in plain diffusers, another number of threads makes a difference of the same order.

*merged* also says how many calls took how many forwards, and which components run alone. *interleaved* pipelines take
turns at every call, *serial* ones run one request at a time.

A pipeline that takes several pictures (a mask, or a guiding picture) gets them from a request's list `image`, in the
order of `image_task.image_arguments` in `/model_info`.
"""


def _summary(rows: list[Row]) -> str:
    lines = ["| | pipelines |", "|---|---|", f"| exported by diffusers | {len(rows)} |"]
    return "\n".join([*lines, *(f"| {name} | {count} |" for name, count in counts(rows).items())]) + "\n"


def _table(kind: str, rows: list[Row]) -> str:
    lines = [f"## {kind.capitalize()}", ""]
    lines += ["| pipeline | served | bitwise | merged | tensor-parallel | note |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(_cells(row) for row in sorted(rows, key=lambda row: row.pipeline))]) + "\n"


def _cells(row: Row) -> str:
    met = f"{row.calls} calls, {row.forwards} forwards" if row.merged else row.mode
    if row.mode == "merged" and row.served and not row.merged:
        met = f"differs by {row.worst:.0e}"
    _, _, alone = row.reason.partition("; ")
    note = _shortened(alone if row.merged else STAGES[row.stage] + row.reason)
    cells = (row.pipeline, _tick(row.served), _tick(row.bitwise), met, row.parallel, note)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _left_out(rows: list[Row]) -> str:
    lines = ["## Not tried", "", "| pipeline | why |", "|---|---|"]
    return "\n".join([*lines, *(f"| {row.pipeline} | {row.reason} |" for row in rows)]) + "\n"


def _tick(value: bool) -> str:
    return "yes" if value else "no"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1].rstrip() + "…"
