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
    """A context that reads tensors, or parts of them, from files by name.

    Of a folder, it reads the files that the library loads. Raises ``FileNotFoundError`` where there are none.
    """

    def __init__(self, source: Path | Sequence[Path]) -> None:
        files = weight_files(source) if isinstance(source, Path) else source
        if not files:
            raise FileNotFoundError(f"{source} holds no safetensors weights")
        self._files = files
        self._opened: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for file in self._files:
            opened = self._stack.enter_context(safe_open(file, framework="pt"))
            self._opened |= dict.fromkeys(opened.keys(), opened)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._opened.clear()

    def __iter__(self) -> Iterator[str]:
        """The names in the order of the files."""
        return iter(self._opened)

    def __contains__(self, name: str) -> bool:
        return name in self._opened

    def __getitem__(self, name: str) -> Any:
        """safetensors' slice of a tensor: ``get_shape()``, ``get_dtype()``, and indexing, which reads."""
        return self._opened[name].get_slice(name)
