"""Digests of weights on disk, equal to what a server that loaded them answers. No model is loaded, torch neither."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..protocol.digests import TORCH_DTYPES, module_digest, tensor_digest
from ..protocol.errors import InvalidRequest
from ..protocol.tensor_files import BadTensorFile, StoredTensor, TensorFile
from .module_files import files_of, module_paths


@dataclass(frozen=True, slots=True)
class TensorChecksum:
    sha256: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModuleChecksum:
    """``tensors`` is empty unless details were asked for."""

    sha256: str
    tensors: dict[str, TensorChecksum]


def checksum(path: Path, modules: Sequence[str] = (), *, detail: bool = False) -> dict[str, ModuleChecksum]:
    """By the name of each of ``modules`` in ``path``, as :func:`module_paths` finds them.

    Raises ``InvalidRequest`` where they are not there, or their files cannot be read.
    """
    found = module_paths(path, modules)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to the others
        digests = pool.map(lambda module: _module(files_of(module), detail), found.values())
        return dict(zip(found, digests, strict=True))


def _module(files: list[Path], detail: bool) -> ModuleChecksum:
    with _opened(files) as tensors:
        names = sorted(tensors)
        whole = module_digest((name, tensors[name][1].data(name)) for name in names)
        each = {name: _tensor(*tensors[name]) for name in names} if detail else {}
    return ModuleChecksum(whole, each)


def _tensor(stored: StoredTensor, file: TensorFile) -> TensorChecksum:
    dtype = TORCH_DTYPES[stored.dtype]
    with file.data(stored.name) as data:
        return TensorChecksum(tensor_digest(dtype, stored.shape, data), dtype, stored.shape)


@contextmanager
def _opened(files: list[Path]) -> Iterator[dict[str, tuple[StoredTensor, TensorFile]]]:
    """Every tensor of the files, by name, with the file that it is in."""
    with ExitStack() as stack:
        found: dict[str, tuple[StoredTensor, TensorFile]] = {}
        for path in files:
            try:
                file = stack.enter_context(TensorFile(path))
            except (BadTensorFile, OSError) as error:
                raise InvalidRequest(f"{path} cannot be read: {error}.") from None
            found |= {name: (stored, file) for name, stored in file.items()}
        yield found
