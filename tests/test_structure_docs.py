"""`docs/structure.md` lists the modules that there are, and imports go the way it says."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "protocol": set(),
    "formats": {"protocol"},
    "process": {"protocol"},
    "server": {"protocol", "formats", "process"},
    "scheduler": {"protocol", "process"},
    "worker": {"protocol", "formats", "process", "rollout"},
    "client": {"protocol", "formats", "process"},
    "shapes": set(),
    "rollout": set(),
}


def test_the_page_is_what_the_modules_are_now() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate_structure.py"))
    made: str = page["document"]()
    assert made == page["PAGE"].read_text(encoding="utf-8"), "run `python docs/generate_structure.py`"


def test_the_worker_s_packages_form_no_circle_and_stay_low_and_loosely_bound() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate_structure.py"))
    arrows: dict[str, set[str]] = page["worker_arrows"]()
    layers: dict[str, int] = page["layers"](arrows)  # raises for a circle
    assert max(layers.values()) <= 7
    assert sum(map(len, arrows.values())) <= 85


def test_every_file_of_the_worker_lies_in_a_package_that_says_what_it_is() -> None:
    assert [path.name for path in (ROOT / "worker").glob("*.py")] == ["__init__.py"]
    for package in (ROOT / "worker").rglob("*/"):
        if any(package.glob("*.py")):
            text = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
            assert text, package
            assert "\n" not in text.split("\n\n")[0], package


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_the_design_allows(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level > depth:
                other = (node.module or "").split(".")[0]
                assert other in {"", *MAY_IMPORT[package]}, f"{path} imports {other}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(
                    name.split(".")[0] == "safelight" for name in names if node.__dict__.get("level", 0) == 0
                )


@pytest.mark.parametrize("package", ["protocol", "formats", "process", "server", "scheduler", "client"])
def test_only_the_worker_imports_torch(package: str) -> None:
    """The client does so within functions too, which are given a trainer's tensors."""
    for path in (ROOT / package).rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            statement = line if package == "client" else line.strip()
            assert not statement.startswith(("import torch", "from torch", "import diffusers")), path


def test_nothing_is_unpickled() -> None:
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                    assert not names & {"pickle", "cloudpickle", "dill", "marshal"}, path


_PATH = re.compile(rf"`((?:{'|'.join(MAY_IMPORT)})/[\w/.-]+\.(?:py|toml))`")


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")))
def test_a_page_names_no_file_that_is_gone(page: str) -> None:
    named = _PATH.findall((ROOT / page).read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_file_and_no_function_outgrows_its_reader(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 40, f"{path}: {node.name}"
