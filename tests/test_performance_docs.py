"""``docs/performance.md`` shows what the results say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
GENERATE: dict[str, Any] = runpy.run_path(str(DOCS / "generate_performance.py"))
TEXT = (DOCS / "performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GENERATE["DRAWN"])
def test_a_picture_is_drawn_from_the_results(name: str) -> None:
    assert f"(pictures/{name}.svg)" in TEXT
    drawn = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert GENERATE["digest"](name) in drawn, "results have changed: run `python docs/generate_performance.py`"
