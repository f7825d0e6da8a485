"""Find the weight files of an update from disk, within the allowed roots."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ..formats.model_names import resolve_model
from ..formats.tensor_files import BadTensorFile, stamp, weight_files
from ..protocol.config import Config
from ..protocol.errors import Forbidden, InvalidRequest, NotFound
from ..protocol.tensor_sources import Files

SUFFIX = ".safetensors"


def find_files(path: str, wanted: list[str] | None, config: Config, *, known: Collection[str]) -> Files:
    """:func:`find_modules`, with stamps that identify the files when they are read, and read again."""
    modules = find_modules(path, wanted, config, known=known)
    try:
        stamps = {file: stamp(os.stat(file)) for files in modules.values() for file in files}
    except OSError as error:
        raise NotFound(f"{path} was removed meanwhile ({error.strerror}).", field="model_path") from None
    return Files(modules, stamps=stamps)


def find_modules(
    path: str, wanted: list[str] | None, config: Config, *, known: Collection[str]
) -> dict[str, list[str]]:
    """The files of the modules ``wanted`` in the checkpoint ``path``; of all that it has, where that is ``None``.

    ``path`` is a pipeline's directory, one component's, or a safetensors file; those two are for the one that is
    wanted, else for the one of the ``known`` modules that the directory is called by. Raises ``NotFound``,
    ``Forbidden`` outside the roots that the server allows, and ``InvalidRequest`` for files that cannot be used.
    """
    try:
        local = isinstance(resolve_model(path), Path)
        found = find_path(path, config)
        modules = _modules(found, wanted, known)
        for file in (file for files in modules.values() for file in files):
            if local:
                allowed(file, config)
            if not file.is_file():
                raise InvalidRequest(f"{file} is not a regular file.", field="model_path")
    except BadTensorFile as error:
        raise InvalidRequest(f"{path} cannot be used: {error}.", field="model_path") from None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a loop of links, an unknown user's home
        raise NotFound(f"There is nothing at {path[:200]} ({type(error).__name__}).", field="model_path") from None
    missing = [name for name in wanted or () if name not in modules]
    if missing or not modules:
        raise NotFound(
            f"{path} has no safetensors weights{f' of {missing[0]}' if missing else ''}; it has "
            f"{', '.join(modules) or 'none'}.",
            field="target_modules" if missing else "model_path",
        )
    return {name: [str(file) for file in files] for name, files in modules.items() if not wanted or name in wanted}


def find_path(path: str, config: Config, field: str = "model_path") -> Path:
    """The file or directory ``path``, where weights may be read from; a hub id's after its download, if allowed.

    Raises ``Forbidden`` and ``NotFound``, and what looking at a path raises.
    """
    named = resolve_model(path)
    return allowed(named, config, field) if isinstance(named, Path) else _download(named, config, field)


def allowed(path: Path, config: Config, field: str = "model_path") -> Path:
    """``path`` without links. Raises ``Forbidden`` outside the roots, and ``OSError`` where there is nothing."""
    resolved = path.resolve(strict=True)
    roots = [Path(root).expanduser() for root in config.weights_roots.split(os.pathsep) if root] or _own_roots(config)
    if not any(resolved.is_relative_to(root.resolve()) for root in roots):
        raise Forbidden(
            f"Files are read from {', '.join(map(str, roots))} only; --weights-roots says from where.",
            field=field,
        )
    return resolved


def _modules(path: Path, wanted: list[str] | None, known: Collection[str]) -> dict[str, list[Path]]:
    if path.is_file() or weight_files(path):
        if wanted is not None and len(wanted) != 1:
            raise InvalidRequest("One component's files are for one module.", field="target_modules")
        files = [path] if path.is_file() else weight_files(path)
        if any(file.suffix != SUFFIX for file in files):
            raise InvalidRequest(f"{path} is no {SUFFIX} file, and nothing else is read.", field="model_path")
        called = path.parent.name if path.is_file() else path.name
        if not wanted and called not in known:
            raise InvalidRequest(
                f"{path} is one component's; say which in target_modules: {', '.join(known)}.", field="target_modules"
            )
        return {wanted[0] if wanted else called: files}
    if not path.is_dir():
        raise InvalidRequest(f"{path} is neither a directory nor a file.", field="model_path")
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    return {folder.name: files for folder in folders if (files := weight_files(folder))}


def _own_roots(config: Config) -> list[Path]:
    """Where the model itself lies, beside it, and the folder that the server was started in."""
    model, here = resolve_model(config.model), Path.cwd()
    own = [_folder_of(model.resolve())] if isinstance(model, Path) else []
    return own if here == Path(here.anchor) else [here, *own]  # a container's root would be everything


def _folder_of(model: Path) -> Path:
    """Where the model lies; of a hub's cache the whole repository, since its files are links into it."""
    return model.parent.parent if model.parent.name == "snapshots" else model.parent


def _download(name: str, config: Config, field: str) -> Path:
    if not config.allow_model_source:
        raise Forbidden(
            f"There is no directory {name}, and weights are not fetched from a hub unless the server is started with "
            "--allow-model-source.",
            field=field,
        )
    from huggingface_hub import snapshot_download  # only who allows it needs it

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        raise NotFound(f"{name} could not be fetched ({type(error).__name__}).", field=field) from error
