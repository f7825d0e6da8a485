"""Docstrings, comments, messages and pages are plain English; ``python tests/test_prose.py`` lists what is not."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

THIS = Path(__file__).resolve()
"""The page of the lint itself, which has to write the phrases down."""

ROOT = THIS.parents[1]
PLAIN = (
    "*.py",
    "README.md",
    "client",
    "formats",
    "process",
    "protocol",
    "rollout",
    "scheduler",
    "server",
    "worker",
    "shapes",
    "benchmarks",
    "examples",
    "docker",
    "assets",
    "docs",
    "tests",
)
"""Every directory with code or pages, and the files beside them."""

_OPENING = re.compile(r"(What|Whether|Of|By|Who|Whose|Whoever|Whatever|That|Those)\b")
"""How no docstring begins: it says what a thing is or does, subject or verb first."""

_PHRASES = re.compile(
    r"\b(told|whoever|whosoever|such as (?:are|is)|of which|by which|by whom|(?:is|are|was|were) to be"
    r"|(?<!there )(?:is|are|was) no (?!longer\b|more\b|less\b)[a-z]+|lets? go of|in hand|nobody's"
    r"|but for such|by itself alone|is said|are said|anatomy|anatomies|dissects?|parking|parked|givers?|test who"
    r"|there is room for|(?:is|are|was|were) ended|used for longest|puts? away|tells? of|what was$|for want of"
    r"|signs? of life|undo cop(?:y|ies)|rooms)\b",
    re.IGNORECASE,
)


def problems(path: Path) -> Iterator[str]:
    """Each as ``file:line: words``."""
    for line, text, opens in prose(path):
        found = [*([_OPENING.match(text)] if opens else []), *_PHRASES.finditer(text)]
        for match in found:
            if match is not None:
                yield f"{path.relative_to(ROOT)}:{line}: {text[max(0, match.start() - 20) : match.end() + 40]!r}"


def prose(path: Path) -> Iterator[tuple[int, str, bool]]:
    """The line, the text (also names of functions, as words), and whether a docstring begins there."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        outside_of_code = re.sub(r"^```.*?^```", lambda code: "\n" * code[0].count("\n"), source, flags=re.M | re.S)
        for line, text in enumerate(outside_of_code.splitlines(), start=1):
            yield line, text, False
        return
    tree = ast.parse(source)
    docstrings = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name.replace("_", " "), False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# "), False
        elif token.type in (tokenize.STRING, tokenize.FSTRING_MIDDLE if hasattr(tokenize, "FSTRING_MIDDLE") else -1):
            text = token.string.lstrip("rbfRBF").strip("\"'")
            if " " in text.strip():
                yield token.start[0], " ".join(text.split()), token.start[0] in docstrings


def _docstrings(tree: ast.Module) -> set[int]:
    """Their lines; also those below attributes."""
    return {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def files(package: str) -> list[Path]:
    """The files of a page or package, or those of a pattern."""
    if "*" in package:
        return sorted(ROOT.glob(package))
    found = ROOT / package
    inside = [found] if found.is_file() else sorted(f for f in found.rglob("*") if f.suffix in (".py", ".md"))
    return [file for file in inside if file != THIS]


@pytest.mark.parametrize("package", PLAIN)
def test_a_reader_need_not_translate(package: str) -> None:
    assert [problem for file in files(package) for problem in problems(file)] == []


if __name__ == "__main__":
    import sys

    for package in sys.argv[1:] or PLAIN:
        for file in files(package):
            print(*problems(file), sep="\n", end="\n" if [*problems(file)] else "")
