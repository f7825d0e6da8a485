"""Log lines: nobody forges one with what he sends."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest

from safelight.process.logs import adopt_library_loggers, as_json_line, configure_logging
from safelight.protocol.config import Config

FORGED = "7\n2026-01-01 00:00:00,000 INFO server [-] all is well\r\x1b[2K\x1b[31m\x9b1m\u2028x\u202ey\ud800\x00"


@pytest.fixture(autouse=True)
def _untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, format_warning = root.handlers[:], root.level, warnings.formatwarning
    yield
    root.handlers[:], root.level, warnings.formatwarning = handlers, level, format_warning
    logging.captureWarnings(False)


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


def test_fields_are_for_machines_and_the_message_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Config(log_format="json"), "server")
    logging.getLogger("safelight").info("it took %d ms", 7, extra={"fields": {"duration_ms": 7.0, "status": 200}})
    line = json.loads(capsys.readouterr().err)
    assert (line["message"], line["duration_ms"], line["status"]) == ("it took 7 ms", 7.0, 200)


def test_a_warning_is_one_record_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Config(), "worker-0")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # as pytest has put its own in its place
        warnings.warn("torch.old is deprecated", FutureWarning, stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"WARNING worker-0 [-] FutureWarning: torch.old is deprecated ({__file__}:" in line


def test_no_library_writes_lines_of_its_own_whenever_it_was_imported(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(Config(log_format="json"), "worker-0")
    library = logging.getLogger("a_library")
    library.addHandler(logging.StreamHandler(sys.stderr))
    library.propagate = False
    adopt_library_loggers()
    logging.getLogger("a_library.part").warning("`dtype` is deprecated")
    logging.getLogger("a_library.part").info("chatter")
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["logger"], line["process"], line["message"]) == ("a_library.part", "worker-0", "`dtype` is deprecated")


def test_a_line_that_is_not_json_becomes_a_message() -> None:
    own = '{"time": "2026-01-01T00:00:00.000Z", "message": "x"}'
    assert as_json_line(own) == own
    for text, message in (
        ("{torn", "{torn"),
        (FORGED[:2] + "50 %\r100 %", "100 %"),
        ("Fatal", "Fatal"),
        ("[W] c10", "[W] c10"),
    ):
        assert json.loads(as_json_line(text))["message"] == message


def test_every_writer_to_standard_error_writes_json_lines_and_none_is_lost() -> None:
    code = (
        "import os, subprocess, sys\nfrom safelight.server.json_stderr import json_stderr\n"
        "with json_stderr():\n"
        "    os.write(2, b'from C++\\n')\n"
        '    print(\'{"message": "own"}\', file=sys.stderr)\n'
        "    subprocess.run([sys.executable, '-c', 'import os; os.write(2, b\"torn\"); os.abort()'])\n"
        "print('after', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    *lines, after = done.stderr.splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["from C++", "own", "torn"]
    assert after == "after"
