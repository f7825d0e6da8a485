"""Log lines: nobody forges one with what he sends."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from safelight.protocol.config import Config
from safelight.protocol.logs import configure_logging

FORGED = "7\n2026-01-01 00:00:00,000 INFO server [-] all is well\r\x1b[2K\x1b[31m\x9b1m\u2028x\u202ey\ud800\x00"


@pytest.fixture(autouse=True)
def _untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_text_from_clients_ends_no_line_and_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Config(), "server")
    logging.getLogger("safelight").info("version %s", FORGED, extra={"request_id": FORGED})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert r"7\n2026" in line


def test_a_traceback_s_lines_cannot_pass_for_records(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Config(), "server")
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("safelight").exception("it failed")
    first, *rest = capsys.readouterr().err.split("\n")[:-1]
    assert first.endswith("it failed")
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert any("all is well" in line for line in rest)


def test_json_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Config(log_format="json"), "server")
    logging.getLogger("safelight").info("version %s", FORGED)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert json.loads(line)["message"] == f"version {FORGED}"
