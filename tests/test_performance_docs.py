"""``docs/performance.md`` shows what the results say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from safelight.benchmarks.caching_tables import tables
from safelight.protocol.step_caching import THRESHOLDS

DOCS = Path(__file__).parent.parent / "docs"
GENERATE: dict[str, Any] = runpy.run_path(str(DOCS / "generate_performance.py"))
TEXT = (DOCS / "performance.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_results() -> None:
    assert GENERATE["document"]() == TEXT, "results have changed: run `python docs/generate_performance.py`"


def test_the_named_thresholds_of_the_step_cache_reach_their_goal_where_readers_see_it() -> None:
    cached = json.loads((GENERATE["RESULTS"] / "caching.json").read_text())["step_cache"]
    percent = {(row["rule"], row["threshold"]): row["judge_percent"] for row in cached["rows"]}
    for name, ratio in cached["alone"].items():
        judged = percent["easycache", THRESHOLDS["easycache"][name]]
        assert (ratio >= 1.6, judged >= percent["off", 0.0] - 1) == (True, True)
        (line,) = [line for line in TEXT.splitlines() if line.startswith(f"| `{name}` (")]
        assert f"| {ratio} |" in line
        assert line.endswith("| met |")


def test_the_page_of_caching_is_made_from_its_results() -> None:
    """The benchmark itself takes minutes: ``python -m safelight.benchmarks.caching --quick``."""
    found = json.loads((GENERATE["RESULTS"] / "caching.json").read_text())
    assert (GENERATE["RESULTS"] / "caching.md").read_text() == tables(found)


@pytest.mark.parametrize("name", GENERATE["DRAWN"])
def test_a_picture_is_drawn_from_the_results(name: str) -> None:
    assert f"(pictures/{name}.svg)" in TEXT
    drawn = (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert GENERATE["digest"](name) in drawn, "results have changed: run `python docs/generate_performance.py`"
