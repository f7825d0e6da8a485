"""Find the weights of modules on disk: in a pipeline's directory, in a module's directory, or in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..formats.tensor_files import BadTensorFile, weight_files
from ..protocol.errors import InvalidRequest


def module_paths(path: Path, wanted: Sequence[str] = ()) -> dict[str, Path]:
    """The directory or file of each module in ``path``, by default all modules.

    If ``path`` is a single module, it takes the name in ``wanted`` or, without one, that of its directory or file.
    Raises ``InvalidRequest`` if ``path`` has no weights, or lacks a module in ``wanted``.
    """
    if (own := own_name(path)) is not None and len(wanted) <= 1:
        return {wanted[0] if wanted else own: path}
    folders = sorted(path.iterdir()) if own is None and path.is_dir() else []
    found = {folder.name: folder for folder in folders if folder.is_dir() and files_of(folder)}
    missing = [name for name in wanted if name not in found]
    if missing or not found:
        what = f"no module {', '.join(missing)}" if missing and found else "no safetensors weights"
        has = f": it has {', '.join(found)}" if found else ""
        raise InvalidRequest(f"{path} has {what}{has}." if path.exists() else f"{path} does not exist.")
    return {name: found[name] for name in wanted or found}


def own_name(path: Path) -> str | None:
    """The module's name if ``path`` is a single module; ``None`` for a pipeline's directory and for a missing path."""
    if path.is_file():
        return path.stem
    return path.resolve().name if files_of(path) else None


def files_of(path: Path) -> list[Path]:
    """The weight files of the single module at ``path``, else none. Raises ``InvalidRequest`` for a broken index."""
    if path.is_file():
        return [path]
    try:
        return weight_files(path)
    except BadTensorFile as error:
        raise InvalidRequest(f"{path}: {error}.") from None
