"""Digests of weights on disk, equal to what a server that loaded them answers. No model is loaded, torch neither."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..protocol.digests import TORCH_DTYPES, module_digest, tensor_digest
from ..protocol.errors import InvalidRequest
from ..protocol.tensor_files import BadTensorFile, StoredTensor, TensorFile, weight_files


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


def checksum(path: Path, modules: Iterable[str] = (), *, detail: bool = False) -> dict[str, ModuleChecksum]:
    """Of every module in a pipeline's directory, or of one component's directory or file, by the module's name.

    Raises ``InvalidRequest`` where ``path`` holds no weights, or not those of all ``modules``.
    """
    found = modules_in(path)
    wanted = list(modules) or list(found)
    missing = [name for name in wanted if name not in found]
    if missing or not found:
        what = f"no module {', '.join(missing)}" if missing else "no safetensors weights"
        raise InvalidRequest(f"{path} has {what}; it has {', '.join(found) or 'nothing of the kind'}.")
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to the others
        digests = pool.map(lambda name: _module(found[name], detail), wanted)
        return dict(zip(wanted, digests, strict=True))


def modules_in(path: Path) -> dict[str, list[Path]]:
    """The weight files of each module in ``path``. Raises ``InvalidRequest`` for a broken index."""
    if path.is_file():
        return {path.stem: [path]}
    try:
        if own := weight_files(path):
            return {path.resolve().name: own}
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
        return {folder.name: files for folder in folders if (files := weight_files(folder))}
    except BadTensorFile as error:
        raise InvalidRequest(f"{path}: {error}.") from None


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
