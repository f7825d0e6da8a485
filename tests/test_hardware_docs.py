"""`docs/hardware.md` says what the results say, and no other page says by hand what has run where."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"

_BY_HAND = re.compile(
    r"\b(not|never|nothing|none)\b[^.|]{0,20}\b(run|ran|measured)\b[^.|]*\b(GPU|CUDA|NCCL)\b"
    r"|\b(GPU|CUDA|NCCL)\b[^.|]*\b(not|never) (yet )?(been )?(run|measured)\b"
    r"|\bnot (yet )?on (a GPU|CUDA)\b",
    re.IGNORECASE,
)


def test_the_page_is_what_the_results_are_now() -> None:
    made: str = runpy.run_path(str(DOCS / "generate_hardware.py"))["document"]()
    page = (DOCS / "hardware.md").read_text(encoding="utf-8")
    assert made == page, "tests or results have changed: run `python docs/generate_hardware.py`"


def test_no_page_says_by_hand_what_has_not_run_on_a_gpu() -> None:
    """Such a sentence would stay when it has run; the table changes with the results."""
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md", *(DOCS.parent / "benchmarks").glob("*.md")]
    found = {
        str(page.relative_to(DOCS.parent)): match[0]
        for page in pages
        if page.name != "hardware.md"
        for match in _BY_HAND.finditer(" ".join(page.read_text(encoding="utf-8").split()))
    }
    assert not found
