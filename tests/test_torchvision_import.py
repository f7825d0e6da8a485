"""torchvision's build for another torch does not keep pipelines from being imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "import logging, safelight; logging.basicConfig(); import torchvision; print(torchvision.described)"


@pytest.fixture
def torchvision(tmp_path: Path) -> Path:
    """A package with the modules that matter; its operators are there where the file ``operators`` says so."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from . import extension\nfrom torchvision import _meta_registrations\n"
        "described = getattr(_meta_registrations, 'described', False)\n"
    )
    (package / "extension.py").write_text("from .operators import loaded\ndef _has_ops():\n    return loaded\n")
    (package / "_meta_registrations.py").write_text(
        "from .operators import loaded\nif not loaded:\n"
        "    raise RuntimeError('operator torchvision::nms does not exist')\ndescribed = True\n"
    )
    return package


@pytest.mark.parametrize("loaded", [True, False])
def test_operators_that_cannot_be_loaded_are_done_without_and_said(loaded: bool, torchvision: Path) -> None:
    (torchvision / "operators.py").write_text(f"loaded = {loaded}\n")
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(torchvision.parent)!r}); {PROGRAM}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(loaded)
    assert ("operators of torchvision cannot be loaded" in done.stderr) is not loaded


def test_image_processors_of_the_torchvision_that_is_installed_can_be_imported() -> None:
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLVideoProcessor

    assert Qwen2VLVideoProcessor().temporal_patch_size == 2
