"""Write the table of modules in ``docs/structure.md`` from their docstrings: ``python docs/generate_structure.py``."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structure.md"
WORKER = ROOT / "worker"
ROOMS = (
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
    for room in ROOMS:
        modules = sorted(path for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py")
        lines += [f"\n### `{room}/`\n", *([_summary(ROOT / room / "__init__.py"), ""] if _has_summary(room) else [])]
        lines += worker_table() if room == "worker" else []
        lines += ["| module | |", "|---|---|"] if modules else []
        lines += [f"| `{path.relative_to(ROOT)}` | {_summary(path)} |" for path in modules]
    return "\n".join(lines) + "\n\n"


def worker_table() -> list[str]:
    arrows = worker_arrows()
    of = floors(arrows)
    lines = ["| floor | room | | imports |", "|---|---|---|---|"]
    for room in sorted(arrows, key=lambda room: (-of[room], room)):
        below = ", ".join(f"`{other}`" for other in sorted(arrows[room], key=lambda other: (-of[other], other)))
        lines.append(f"| {of[room]} | `{room}` | {_summary(WORKER / room / '__init__.py')} | {below} |")
    return [*lines, ""]


def worker_arrows() -> dict[str, set[str]]:
    """Each room of ``worker``, and the other rooms of it that any of its files imports, at any place in the file."""
    arrows: dict[str, set[str]] = {path.parent.name: set() for path in WORKER.glob("*/__init__.py")}
    for path in WORKER.rglob("*.py"):
        room = path.relative_to(WORKER).parts[0]
        if path.parent == WORKER and path.name == "__init__.py":
            continue
        arrows.setdefault(room, set()).update(set(_imported_rooms(path)) - {room})
    return arrows


def floors(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """The floor of each room: one above the highest that it imports. Raises ``CycleError`` for a circle."""
    of: dict[str, int] = {}
    for room in TopologicalSorter(arrows).static_order():
        of[room] = 1 + max((of[other] for other in arrows[room]), default=0)
    return of


def _imported_rooms(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            for alias in node.names:
                parts = [part for part in (*base, alias.name) if part]
                if parts[0] == WORKER.name:
                    yield parts[1]


def _has_summary(room: str) -> bool:
    init = ROOT / room / "__init__.py"
    return init.exists() and ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) is not None


def _summary(path: Path) -> str:
    """The first paragraph of a module's docstring, as one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
