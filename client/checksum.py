"""Digests of weights on disk, equal to what a server that loaded them answers. No model is loaded.

Torch is needed only where a server stores tensors in another dtype than the files have.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..formats.digests import STORED_DTYPES, TORCH_DTYPES, module_digest
from ..formats.tensor_files import BadTensorFile, StoredTensor, TensorFile
from ..protocol.errors import InvalidRequest
from .host_tensors import HostTensor
from .module_files import files_of, module_paths


@dataclass(frozen=True, slots=True)
class TensorChecksum:
    sha256: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModuleChecksum:
    """``tensors`` is empty unless details were asked for.

    A server says in ``aliases`` by which other names it takes some of them, and in ``ignored`` the patterns of names
    that it reads over. Of files that were digested as a server
    stores them, ``cast`` says from which dtype to which, as torch writes them, and how many.
    """

    sha256: str
    tensors: dict[str, TensorChecksum]
    aliases: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    cast: dict[tuple[str, str], int] = field(default_factory=dict)


Found = dict[str, tuple[StoredTensor, TensorFile]]
"""Every tensor of some files, by name, with the file that it is in."""

Stored = Mapping[str, ModuleChecksum]
"""How a server stores its modules, by name; with details."""


def checksum(
    path: Path, modules: Sequence[str] = (), *, detail: bool = False, like: Stored | None = None
) -> dict[str, ModuleChecksum]:
    """By the name of each of ``modules`` in ``path``, as :func:`module_paths` finds them.

    Where a server that stores tensors ``like`` this is given, names and dtypes are those that it would store them by.
    Raises ``InvalidRequest`` where they are not there, or their files cannot be read.
    """
    found = module_paths(path, modules)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to the others
        digests = pool.map(lambda name: _module(files_of(found[name]), detail, (like or {}).get(name)), found)
        return dict(zip(found, digests, strict=True))


def _module(files: list[Path], detail: bool, like: ModuleChecksum | None) -> ModuleChecksum:
    each: dict[str, TensorChecksum] = {}
    cast: dict[tuple[str, str], int] = {}
    with _opened(files) as found:
        whole = module_digest(_noted(found, like, each if detail else None, cast))
    return ModuleChecksum(whole, each, cast=cast)


def _noted(
    found: Found, like: ModuleChecksum | None, each: dict[str, TensorChecksum] | None, cast: dict[tuple[str, str], int]
) -> Iterator[tuple[str, memoryview]]:
    """Every tensor's name and bytes, sorted, as it is held; what is to be told of them is put into the last two."""
    stored_as = {} if like is None else like.tensors
    names = {
        name if like is None else _own_name(name, found, like): name
        for name in found
        if like is None or not _is_ignored(name, like)
    }
    for name in sorted(names):
        stored, file = found[names[name]]
        dtype = STORED_DTYPES[stored_as[name].dtype] if name in stored_as else stored.dtype
        tensor = HostTensor(name, stored.dtype, stored.shape, file.data(stored.name)).cast(dtype)
        told = TORCH_DTYPES[tensor.dtype]
        if each is not None:
            each[name] = TensorChecksum(tensor.digest(), told, tensor.shape)
        if tensor.dtype != stored.dtype:
            kinds = TORCH_DTYPES[stored.dtype], told
            cast[kinds] = cast.get(kinds, 0) + 1
        yield name, tensor.data


def _own_name(name: str, given: Container[str], like: ModuleChecksum) -> str:
    """The server's name for what files call ``name``, unless they have that too."""
    own = like.aliases.get(name, name)
    return name if name in like.tensors or own in given else own


def _is_ignored(name: str, like: ModuleChecksum) -> bool:
    """Whether the server that stores ``like`` this would read over what files call ``name``."""
    return name not in like.tensors and any(re.search(pattern, name) for pattern in like.ignored)


@contextmanager
def _opened(files: list[Path]) -> Iterator[Found]:
    with ExitStack() as stack:
        found: Found = {}
        for path in files:
            try:
                file = stack.enter_context(TensorFile(path))
            except (BadTensorFile, OSError) as error:
                raise InvalidRequest(f"{path} cannot be read: {error}.") from None
            found |= {name: (stored, file) for name, stored in file.items()}
        yield found
