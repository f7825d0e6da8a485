"""The safetensors files of one component of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import safe_open

from ....formats.tensor_files import weight_files


class WeightFiles:
    """A context in which the tensors of some files can be read by name, or by parts; nothing is read beforehand.

    Of a folder, they are the files that a component's library loads. Raises ``FileNotFoundError`` where there are none.
    """

    def __init__(self, source: Path | Sequence[Path]) -> None:
        files = weight_files(source) if isinstance(source, Path) else source
        if not files:
            raise FileNotFoundError(f"{source} holds no safetensors weights")
        self._files = files
        self._places: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for file in self._files:
            opened = self._stack.enter_context(safe_open(file, framework="pt"))
            self._places |= dict.fromkeys(opened.keys(), opened)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._places.clear()

    def __iter__(self) -> Iterator[str]:
        """The names, in the order in which the files list them."""
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Any:
        """safetensors' slice of a tensor: ``get_shape()``, ``get_dtype()``, and indexing, which reads."""
        return self._places[name].get_slice(name)
