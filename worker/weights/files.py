"""The safetensors files of one component of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import safe_open

_STEMS = ("diffusion_pytorch_model", "model")


class WeightFiles:
    """A context in which the tensors of ``folder`` can be read by name, or by parts; nothing is read beforehand.

    Raises ``FileNotFoundError`` where there are no safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places = _places(folder)
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._open.clear()

    def __iter__(self) -> Iterator[str]:
        """The names, in the order in which the files list them."""
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Any:
        """safetensors' slice of a tensor: ``get_shape()``, ``get_dtype()``, and indexing, which reads."""
        file = self._places[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
        return self._open[file].get_slice(name)


def _places(folder: Path) -> dict[str, str]:
    """Tensor name to the name of its file."""
    for stem in _STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            places: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return places
        file = folder / f"{stem}.safetensors"
        if file.exists():
            with safe_open(file, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), file.name)
    raise FileNotFoundError(f"{folder} holds no {' or '.join(f'{stem}.safetensors' for stem in _STEMS)}")
