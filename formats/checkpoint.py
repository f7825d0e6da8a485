"""Check a model's path before any process starts, so that a wrong path is refused at once, in one sentence.

This module does not import torch; it reads only a directory's ``model_index.json`` or a single file's header. Only
diffusers knows which files of a directory it loads: the worker asks it and inspects those.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from pathlib import Path

from ..protocol.errors import StartFailed
from .model_names import EMBEDDED, resolve_model
from .pipeline_index import read_index
from .tensor_files import MAX_HEADER

SAFETENSORS, GGUF = ".safetensors", ".gguf"

_GGUF_MAGIC = b"GGUF"
_POINTER = b"version https://git-lfs"


def check_model(name: str, *, revision: str | None = None, base: str | None = None) -> None:
    """Raise ``StartFailed`` unless ``name`` is a hub id, the directory of a pipeline, or a single-file checkpoint.

    ``base`` is the pipeline of a single-file checkpoint, ``revision`` the revision of a hub repository.
    """
    model = resolve_model(name)
    if isinstance(model, Path):
        check_path(model)
    single = isinstance(model, Path) and model.is_file()
    if base is not None and not single:
        raise StartFailed(f"--base-pipeline is for single-file checkpoints, but the model {name} is not a file.")
    if base is not None and isinstance(found := resolve_model(base), Path):
        check_directory(found)
    if revision is not None and isinstance(model, Path) and not (single and isinstance(resolve_model(base or ""), str)):
        raise StartFailed(f"--revision is for hub repositories, but the model {name} is on this machine.")


def check_path(path: Path) -> None:
    """Raise ``StartFailed``, with the remedy, unless ``path`` looks like a pipeline or a single-file checkpoint."""
    if not path.exists():
        raise StartFailed(
            f"The model path {path} does not exist{_meant(path)}; give the directory of a diffusers pipeline, a "
            "single-file checkpoint, a hub id such as `org/name`, or the name of an embedded model: "
            f"{' or '.join(EMBEDDED)}."
        )
    if path.is_file():
        check_single_file(path)
    else:
        check_directory(path)


def _meant(path: Path) -> str:
    """Suggest, in parentheses, an embedded model or a sibling path with a similar name."""
    try:
        neighbours = [entry.name for entry in path.parent.iterdir()]
    except OSError:  # missing, or not readable
        neighbours = []
    embedded = EMBEDDED if len(path.parts) == 1 else ()
    close = difflib.get_close_matches(path.name, [*embedded, *neighbours], n=1, cutoff=0.7)
    if not close:
        return ""
    return f" (did you mean {close[0] if close[0] in embedded else path.parent / close[0]}?)"


def check_directory(directory: Path) -> None:
    """Raise ``StartFailed`` unless ``directory`` has the index of a diffusers pipeline."""
    if not directory.is_dir():
        raise StartFailed(f"{directory} is not a directory; give the directory of a diffusers pipeline.")
    read_index(directory)


def check_single_file(file: Path) -> None:
    """Raise ``StartFailed`` unless ``file`` has a supported format: safetensors, or GGUF with its package."""
    if file.suffix == SAFETENSORS:
        check_tensor_file(file)
    elif file.suffix == GGUF:
        _check_gguf(file)
    else:
        raise StartFailed(
            f"The model path {file} is a file that is neither {SAFETENSORS} nor {GGUF}; pickled weights (.ckpt, .bin, "
            ".pt), which can run code, are never loaded. Convert the file, or give the directory of a pipeline."
        )


def _check_gguf(file: Path) -> None:
    with file.open("rb") as stream:
        magic = stream.read(len(_POINTER))
    if not magic.startswith(_GGUF_MAGIC):
        raise StartFailed(_unreadable(file, magic, "GGUF"))
    if importlib.util.find_spec("gguf") is None:
        raise StartFailed(f"{file} needs the package gguf; install it with `pip install safelight[gguf]`.")


def check_tensor_file(file: Path) -> None:
    """Raise ``StartFailed`` unless the header of ``file`` describes a safetensors file of just its size.

    A safetensors file is 8 bytes with the header's length, the header as JSON, and the tensors' bytes.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        header = stream.read(length) if 2 <= length <= min(size - 8, MAX_HEADER) else b""
        stream.seek(0)
        begin = stream.read(len(_POINTER))
    try:
        tensors = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise StartFailed(_unreadable(file, begin, "safetensors")) from None
    if 8 + length + end != size:
        raise StartFailed(
            f"{file} is incomplete: its header describes {8 + length + end} bytes and it has {size}; download it again."
        )


def _unreadable(file: Path, begin: bytes, format: str) -> str:
    if begin.startswith(_POINTER):
        return f"{file} is a pointer of git-lfs and not the file itself; fetch it with `git lfs pull`."
    return f"{file} is not a readable {format} file; download or save it again."
