"""Write ``docs/hardware.md`` from the results of tests/cuda: ``python docs/generate_hardware.py``."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("hardware.md")
ROOT = PAGE.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NONE = "–"
DEVICES = {"cpu": "CPU", "played": "played CUDA", "cuda": "CUDA"}

HEAD = """\
# Hardware

<!-- Made by `python docs/generate_hardware.py`; what is written here by hand is lost. -->

What has run where. Everything in this project has run on CPUs, where the test suite compares it with plain
diffusers. The code for GPUs also runs on *played* CUDA devices: the CPU computes with real values, and the rules,
the waits and the memory are those of a GPU. [tests.md](tests.md#tests-for-gpus-on-a-machine-without-one) says what
that shows and what it cannot. Speed, rounding, CUDA's own kernels, NCCL, CUDA IPC, Triton and the order of streams
are known only where the column *CUDA* has results, and from `python -m safelight.benchmarks.gpu`, whose results are
in `benchmarks/results/` once it has run.

The numbers are tests that passed; "–" is a place where none has run. Most of these claims are about the memory and the
waits of a GPU, so few of these tests run on a CPU.
"""

TAIL = """
`make test-cuda` fills the column *CUDA* on a machine with a GPU, and
`make test-played-cuda RECORD=1 TEST_EFFORT=nightly` the one before; with `TEST_DEVICE=cpu` it fills the first. Each
writes `benchmarks/results/devices-….json`, from which this page is made.
"""


def document() -> str:
    """The whole page."""
    results = {kind: _read(kind) for kind in DEVICES}
    lines = [HEAD, "| claim | test | " + " | ".join(DEVICES.values()) + " |", "|---|---|" + "---|" * len(DEVICES)]
    for path in sorted((ROOT / "tests" / "cuda").glob("test_*.py")):
        cells = [_cell(result, path.stem) for result in results.values()]
        if cells == [NONE] * len(cells):
            continue  # nobody has recorded it yet
        lines.append(f"| {_claim(path)} | `cuda/{path.stem}` | " + " | ".join(cells) + " |")
    machines = [f"- {DEVICES[kind]}: {_machine(found)}" for kind, found in results.items() if found]
    return "\n".join([*lines, "", *machines]) + "\n" + TAIL


def _read(kind: str) -> dict[str, Any]:
    path = RESULTS / f"devices-{kind}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _claim(path: Path) -> str:
    """The first sentence of the file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")


def _cell(result: dict[str, Any], name: str) -> str:
    outcomes = result.get("files", {}).get(name, {})
    passed, failed = outcomes.get("passed", 0), outcomes.get("failed", 0)
    if failed:
        return f"{passed}, and {failed} failed"
    return str(passed) if passed else NONE


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    gpu = f"{machine['gpu']}, " if result["device"] == "cuda" else ""
    return f"{gpu}{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
