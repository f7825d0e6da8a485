"""A wheel holds what a clone holds, but for what made the embedded models."""

from __future__ import annotations

import tomllib
from pathlib import Path

from safelight.formats.model_names import EMBEDDED_ADAPTERS, embedded_adapter

ROOT = Path(__file__).resolve().parent.parent
NOT_INSTALLED = {"tests", "benchmarks", "examples", "docs", "docker", "build"}
TRAINING = {"safelight.shapes.train", "safelight.shapes.motion.train"}


def test_every_package_is_in_the_distribution() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    packages = (folder for folder in ROOT.iterdir() if folder.is_dir() and folder.name not in NOT_INSTALLED)
    found = {
        file.parent for package in packages if not package.name.startswith(".") for file in package.rglob("__init__.py")
    }
    names = {".".join(("safelight", *folder.relative_to(ROOT).parts)) for folder in found}
    assert listed == (names | {"safelight"}) - TRAINING


def test_no_embedded_adapter_is_left_out_of_the_distribution() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {file for pattern in patterns["safelight.assets"] for file in (ROOT / "assets").glob(pattern)}
    assert {embedded_adapter(name) for name in EMBEDDED_ADAPTERS} <= packed
