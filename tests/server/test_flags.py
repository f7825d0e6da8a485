"""Flags, environment and file: every option has a flag, and the nearer source wins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from safelight.process.configuration import Option, options
from safelight.protocol.errors import StartFailed
from safelight.server import flags
from safelight.server.flags import make_parser, read_config
from safelight.server.launch import WRONG_START
from safelight.server.listener import listen


def test_every_option_has_a_flag_and_a_place_in_the_help() -> None:
    text = " ".join(make_parser().format_help().split())
    assert all(option.flag in text and f"{option.group}: " in text for option in options())
    assert all(option.description in text for option in options())


def test_an_option_with_choices_keeps_them_where_it_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Literal[...] | None`` is a ``typing.Union``, where ``str | None`` is a ``types.UnionType``."""
    option = Option("colour", Literal["red", "blue"] | None, None, "A colour", "Looks")
    monkeypatch.setattr(flags, "options", lambda: [option])
    assert make_parser().parse_args(["--colour", "red"]).colour == "red"
    with pytest.raises(StartFailed, match="green"):
        make_parser().parse_args(["--colour", "green"])


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "safelight.toml"
    file.write_text("port = 1\nmax_steps = 2\nmax_queue = 3\nmodel = 'from-file'")
    environment = {"SAFELIGHT_PORT": "10", "SAFELIGHT_MAX_STEPS": "20", "SAFELIGHT_UNKNOWN": "x"}
    config = read_config(["--config", str(file), "--port", "100"], environment)
    assert (config.port, config.max_steps, config.max_queue, config.model) == (100, 20, 3, "from-file")
    assert config.host == "127.0.0.1", "what nobody gave has its default"


def test_a_misspelt_variable_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(StartFailed, match="SAFELIGHT_MAX_BACH; did you mean SAFELIGHT_MAX_BATCH"):
        read_config([], {"SAFELIGHT_MAX_BACH": "8"})
    others = {
        "SAFELIGHT_URL": "x",
        "SAFELIGHT_SERVICE_HOST": "x",
        "SAFELIGHT_PORT_30000_TCP_ADDR": "x",
        "MAX_BACH": "8",
    }
    assert read_config([], others).max_batch == 16, "a cluster's own variables and the client's are not options"


def test_the_positional_model_is_the_model() -> None:
    assert read_config(["some/model", "--replicas", "2"], {}).model == "some/model"
    assert read_config([], {"SAFELIGHT_MODEL": "other"}).model == "other"
    assert read_config([], {}).model == "shapes"


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--port", "70000"], "port"),
        (["--port", "many"], "port"),
        (["--replicas", "0"], "replicas"),
        (["--device", "tpu"], "--device"),
        (["--prot", "1"], "--prot"),
        (["--por", "1"], "--por"),
        (["a", "b"], "b"),
        (["a", "--model", "b"], "given twice"),
        (["--config", "/nowhere.toml"], "/nowhere.toml does not exist"),
        (["--grace-s", "inf"], "grace_s is inf; it must be a finite number"),
        (["--request-timeout-s", "1e999"], "request_timeout_s"),
    ],
)
def test_a_wrong_flag_is_reported_in_one_sentence(arguments: list[str], reported: str) -> None:
    with pytest.raises(StartFailed) as raised:
        read_config(arguments, {})
    assert reported in raised.value.message
    assert "\n" not in raised.value.message


def test_a_key_comes_from_a_variable_or_a_file_that_no_process_list_shows(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-a-file\n")
    assert read_config(["--api-key-file", str(file)], {}).api_key == "from-a-file"
    assert read_config([], {"SAFELIGHT_API_KEY_FILE": str(file)}).api_key == "from-a-file"
    assert read_config([], {"SAFELIGHT_API_KEY": "from-a-variable"}).api_key == "from-a-variable"


@pytest.mark.parametrize("key", ["", " ", "two words", "line\nend", "\x1b[0m"])
def test_a_key_that_no_client_could_send_ends_the_start(key: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(key)
    for arguments in (["--api-key", key], ["--api-key-file", str(file)]):
        with pytest.raises(StartFailed, match="API key must be"):
            read_config(arguments, {})


def test_a_key_file_that_is_not_there_or_not_alone_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="No such file"):
        read_config(["--api-key-file", str(tmp_path / "nothing")], {})
    with pytest.raises(StartFailed, match="given twice"):
        read_config(["--api-key-file", str(tmp_path / "nothing")], {"SAFELIGHT_API_KEY": "k"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_server_that_strangers_reach_needs_a_key(host: str) -> None:
    with pytest.raises(StartFailed, match="--insecure"):
        listen(host, 0)
    listen(host, 0, beyond_loopback=True).close()


@pytest.mark.parametrize("host", ["a" * 70, "a..b", "a\x00b", "", "[::]"])
def test_an_invalid_host_name_is_reported_in_one_sentence(host: str) -> None:
    with pytest.raises(StartFailed, match="give another --host"):
        listen(host, 0)


def test_a_path_in_a_refusal_moves_no_cursor_and_forges_no_line() -> None:
    """Paths come from scripts and files that others write."""
    command = [sys.executable, "-P", "-m", "safelight.server", "/nowhere\x1b[2J\nready: forged"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == WRONG_START
    assert (len(ended.stderr.splitlines()), "\x1b" in ended.stderr, ended.stdout) == (1, False, "")
