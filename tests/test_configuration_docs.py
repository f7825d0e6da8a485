"""`docs/configuration.md` says what the code does."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from safelight.process.configuration import load_config, options
from safelight.protocol.config import Config

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "configuration.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_options_are_now() -> None:
    made: str = runpy.run_path(str(DOCS / "generate_configuration.py"))["document"]()
    assert made == TEXT, "the options have changed: run `python docs/generate_configuration.py`"


def test_every_option_is_listed_once() -> None:
    for option in options():
        assert TEXT.count(f"| `{option.flag}` | `{option.variable}` | `{option.name}` |") == 1


def test_the_example_file_can_be_used(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, flags=re.DOTALL)
    path = tmp_path / "safelight.toml"
    path.write_text(example)
    config = load_config({}, file=path)
    assert config == Config(model="path/to/pipeline", port=8000, max_batch=8, grace_s=10.0, log_format="json")
