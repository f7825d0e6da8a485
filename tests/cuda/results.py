"""The results of these tests on a device, as JSON for the table of ``docs/hardware.md``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from safelight.benchmarks.machine import describe

from .device import KIND


class Results:
    """A plugin of pytest that counts outcomes by file, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # a failure before or after the call, or a skip
            self._outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        files: dict[str, Counter[str]] = {}
        for node, outcome in sorted(self._outcomes.items()):
            files.setdefault(Path(node.partition("::")[0]).stem, Counter())[outcome] += 1
        found = {"device": KIND, "machine": describe(), "files": files}
        self._path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
