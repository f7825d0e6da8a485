"""``python -m safelight.benchmarks.coverage``: examine every pipeline class, and write down what was found."""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from ..machine import describe
from .catalogue import exported, kind, left_out
from .child import examined
from .report import Findings, counts, line, page, read, write
from .row import Row

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
DOCS = ROOT / "docs" / "models.md"
LIBRARIES = ("diffusers", "transformers", "torch", "torchvision", "ftfy")


def main() -> None:
    """Examine, write the results, and make the page of the documentation from them."""
    options = _options()
    if not options.docs:
        with tempfile.TemporaryDirectory() as temporary:
            scratch = options.scratch or Path(temporary)
            scratch.mkdir(parents=True, exist_ok=True)
            _examine(options.only or exported(), scratch, options.timeout)
    findings = read(RESULTS)
    DOCS.write_text(page(findings))
    for name, count in counts(findings.rows.values()).items():
        print(f"{count:4d} {name}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these classes; the others' rows stay as they are")
    parser.add_argument("--scratch", type=Path, help="where checkpoints and logs go (a temporary directory)")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds for one class")
    parser.add_argument("--docs", action="store_true", help="only make docs/models.md from the results")
    return parser.parse_args()


def _examine(names: list[str], scratch: Path, timeout_s: float) -> None:
    """The rows are written after each class, so an interrupted run has lost nothing."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    findings = Findings(describe(), _libraries(), read(RESULTS).rows)
    for name in names:
        reason = left_out(name)
        row = examined(name, scratch, timeout_s) if reason is None else Row(name, kind(name), "left out", reason)
        findings.rows[name] = row
        write(findings, RESULTS)
        print(line(row), flush=True)


def _libraries() -> dict[str, str]:
    """Versions of what decides which pipelines there are, and which of them run."""
    installed = {distribution.name: distribution.version for distribution in distributions()}
    return {name: installed.get(name, "") for name in LIBRARIES}


if __name__ == "__main__":
    main()
