"""Looks at a model's files before anything is started, so that a wrong path is told at once and in one sentence.

Only names, JSON and the headers of safetensors files are read; no weights, and nothing is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import StartFailed
from .models import resolve_model

_LIBRARIES = ("diffusers", "transformers")
_WITHOUT_WEIGHTS = (
    "Scheduler", "Guidance", "Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "FeatureExtractor",
)  # fmt: skip
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER = 100_000_000  # the bound of the safetensors format itself


def check_model(name: str) -> None:
    """Raise ``StartFailed`` unless ``name`` is a hub id or a directory that looks like a complete pipeline."""
    model = resolve_model(name)
    if isinstance(model, Path):
        check_directory(model)


def check_directory(directory: Path) -> None:
    """Raise ``StartFailed``, saying what to do, unless ``directory`` looks like a complete diffusers pipeline."""
    if not directory.exists():
        raise StartFailed(
            f"The model path {directory} does not exist; give the directory of a diffusers pipeline, "
            "a hub id such as `org/name`, or the name of an embedded model: shapes or shapes-video."
        )
    if not directory.is_dir():
        raise StartFailed(
            f"The model path {directory} is a file; give the directory of a diffusers pipeline, "
            "as `save_pretrained` writes it."
        )
    index = directory / "model_index.json"
    if not index.is_file():
        raise StartFailed(
            f"{directory} is no diffusers pipeline, because it has no model_index.json; "
            "give the directory that `save_pretrained` wrote."
        )
    for component, entry in _read_object(index).items():
        if not component.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[0] is not None:
            _check_component(directory / component, library=str(entry[0]), class_name=str(entry[1]))


def _check_component(folder: Path, *, library: str, class_name: str) -> None:
    if not folder.is_dir():
        raise StartFailed(
            f"The model lacks its component {folder.name}: there is no directory {folder}; "
            "download or save the pipeline again."
        )
    if library not in _LIBRARIES or class_name.endswith(_WITHOUT_WEIGHTS):
        return
    if not (folder / "config.json").is_file():
        raise StartFailed(
            f"The component {folder.name} has no config.json in {folder}; download or save the pipeline again."
        )
    _read_object(folder / "config.json")
    for file in _weight_files(folder):
        _check_header(file)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the component's weights."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        names = _read_object(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise StartFailed(f"{index} has no weight_map; download the component {folder.name} again.")
        missing = sorted({str(name) for name in names.values() if not (folder / str(name)).is_file()})
        if missing:
            raise StartFailed(
                f"The component {folder.name} lacks the weight file {missing[0]}, which {index} names; "
                "download it again."
            )
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise StartFailed(
            f"The component {folder.name} has only pickled weights ({folder / pickled[0]}), which can run code and "
            "are never loaded; convert them with `save_pretrained(..., safe_serialization=True)`."
        )
    raise StartFailed(
        f"The component {folder.name} has no weights: there is no .safetensors file in {folder}; "
        "download or save the pipeline again."
    )


def _check_header(file: Path) -> None:
    """A safetensors file is 8 bytes with the header's length, the header as JSON, and the tensors' bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 2 <= length <= min(size - 8, _MAX_HEADER) else b""
    try:
        tensors = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise StartFailed(f"{file} is no readable safetensors file; download or save it again.") from None
    if 8 + length + end != size:
        raise StartFailed(
            f"{file} is incomplete: its header describes {8 + length + end} bytes and it has {size}; download it again."
        )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise StartFailed(f"{file} cannot be read as JSON; download or save the pipeline again.") from None
    if not isinstance(value, dict):
        raise StartFailed(f"{file} holds no JSON object; download or save the pipeline again.")
    return value
