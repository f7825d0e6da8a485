"""Write the table of modules in ``docs/structure.md`` from their docstrings: ``python docs/generate_structure.py``."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structure.md"
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
        lines += ["| module | |", "|---|---|"] if modules else []
        lines += [f"| `{path.relative_to(ROOT)}` | {_summary(path)} |" for path in modules]
    return "\n".join(lines) + "\n\n"


def _has_summary(room: str) -> bool:
    init = ROOT / room / "__init__.py"
    return init.exists() and ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) is not None


def _summary(path: Path) -> str:
    """The first paragraph of a module's docstring, as one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
