"""Flags, environment and file: every option has a flag, and the nearer source wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.protocol.config import options
from safelight.protocol.errors import StartFailed
from safelight.server.flags import GROUPS, make_parser, read_config


def test_every_option_has_a_flag_and_a_place_in_the_help() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(option.name for option in options())
    text = " ".join(make_parser().format_help().split())
    assert all(option.flag in text for option in options())
    assert all(option.description in text for option in options())


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "safelight.toml"
    file.write_text("port = 1\nmax_steps = 2\nmax_queue = 3\nmodel = 'from-file'")
    environment = {"SAFELIGHT_PORT": "10", "SAFELIGHT_MAX_STEPS": "20", "SAFELIGHT_UNKNOWN": "x"}
    config = read_config(["--config", str(file), "--port", "100"], environment)
    assert (config.port, config.max_steps, config.max_queue, config.model) == (100, 20, 3, "from-file")
    assert config.host == "127.0.0.1", "what nobody gave has its default"


def test_the_positional_model_is_the_model() -> None:
    assert read_config(["some/model", "--replicas", "2"], {}).model == "some/model"
    assert read_config([], {"SAFELIGHT_MODEL": "other"}).model == "other"
    assert read_config([], {}).model == "shapes"


@pytest.mark.parametrize(
    ("arguments", "told"),
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
    ],
)
def test_a_wrong_flag_is_told_in_one_sentence(arguments: list[str], told: str) -> None:
    with pytest.raises(StartFailed) as raised:
        read_config(arguments, {})
    assert told in raised.value.message
    assert "\n" not in raised.value.message
