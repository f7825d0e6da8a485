"""Write the table of modules in ``docs/structure.md`` from their docstrings: ``python docs/generate_structure.py``."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structure.md"
WORKER = ROOT / "worker"
PACKAGES = (
    "protocol", "formats", "process", "server", "scheduler", "worker", "client",
    "rollout", "shapes", "assets", "benchmarks", "examples",
)  # fmt: skip
BEGIN, END = "<!-- modules: made by `python docs/generate_structure.py` -->\n", "<!-- end of modules -->\n"


def document() -> str:
    """The page's text with a fresh table."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table() + END + after


def table() -> str:
    lines = []
    for package in PACKAGES:
        modules = sorted(path for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py")
        lines += [
            f"\n### `{package}/`\n",
            *([_summary(ROOT / package / "__init__.py"), ""] if _has_summary(package) else []),
        ]
        lines += worker_table() if package == "worker" else []
        lines += ["| module | |", "|---|---|"] if modules else []
        lines += [f"| `{path.relative_to(ROOT)}` | {_summary(path)} |" for path in modules]
    return "\n".join(lines) + "\n\n"


def worker_table() -> list[str]:
    arrows = worker_arrows()
    of = layers(arrows)
    lines = ["| layer | package | | imports |", "|---|---|---|---|"]
    for package in sorted(arrows, key=lambda package: (-of[package], package)):
        below = ", ".join(f"`{other}`" for other in sorted(arrows[package], key=lambda other: (-of[other], other)))
        lines.append(f"| {of[package]} | `{package}` | {_summary(WORKER / package / '__init__.py')} | {below} |")
    return [*lines, ""]


def worker_arrows() -> dict[str, set[str]]:
    """Each package of ``worker``, and its other packages that any of the files imports, anywhere in the file."""
    arrows: dict[str, set[str]] = {path.parent.name: set() for path in WORKER.glob("*/__init__.py")}
    for path in WORKER.rglob("*.py"):
        package = path.relative_to(WORKER).parts[0]
        if path.parent == WORKER and path.name == "__init__.py":
            continue
        arrows.setdefault(package, set()).update(set(_imported_packages(path)) - {package})
    return arrows


def layers(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """The layer of each package: one above the highest that it imports. Raises ``CycleError`` for a circle."""
    of: dict[str, int] = {}
    for package in TopologicalSorter(arrows).static_order():
        of[package] = 1 + max((of[other] for other in arrows[package]), default=0)
    return of


def _imported_packages(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            for alias in node.names:
                parts = [part for part in (*base, alias.name) if part]
                if parts[0] == WORKER.name:
                    yield parts[1]


def _has_summary(package: str) -> bool:
    init = ROOT / package / "__init__.py"
    return init.exists() and ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) is not None


def _summary(path: Path) -> str:
    """The first paragraph of a module's docstring, as one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
