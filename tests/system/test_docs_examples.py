"""The Python of README and docs/, run in the order of each page against a live server of the embedded model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image

from safelight import assets
from safelight.tests.live import LiveServer

ROOT = Path(__file__).parents[2]
SHAPES = Path(assets.__file__).parent / "shapes"
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PLACES = {"Client()": "Client({url!r})", '"http://127.0.0.1:30000"': "{url!r}", '"/models/step-90"': "{shapes!r}"}
"""Values that differ for each reader: the server, and a checkpoint."""
_FEWER = {"n=16": "n=2", "steps=10": "steps=2", "range(10)": "range(2)"}
PAGES = [
    page
    for page in ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
    if _BLOCK.search((ROOT / page).read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    roots = ["--weights-roots", str(ROOT / "assets")]
    with LiveServer("shapes", ["--threads", "1", "--dtype", "float32", *roots]) as server:
        yield server.wait_ready().url


@pytest.mark.parametrize("page", PAGES)
def test_no_example_of_a_page_fails_for_who_copies_it(
    page: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    names = run(page, url)
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as picture:
            assert picture.format == "PNG"
    if page == "docs/lora.md":
        assert (tmp_path / "out.png").exists()
        assert [(one.nickname, one.strength) for one in names["generation"].adapters] == [("style", 0.8)]
    if page == "docs/rollouts.md":
        reported = torch.stack([sample.log_probs for sample in names["group"]])
        assert torch.allclose(names["recomputed"], reported, rtol=0, atol=1e-5)


def run(page: str, url: str) -> dict[str, Any]:
    """The page's variables at its end; before it, a reader has modules of his own."""
    names: dict[str, Any] = {
        "transformer": FluxTransformer2DModel.from_pretrained(SHAPES, subfolder="transformer"),
        "vae": AutoencoderKL.from_pretrained(SHAPES, subfolder="vae"),
    }
    for block in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        for written, meant in (_PLACES | _FEWER).items():
            block = block.replace(written, meant.format(url=url, shapes=str(SHAPES)))
        exec(compile(block, page, "exec"), names)
    return names
