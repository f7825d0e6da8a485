"""Digests of weights on disk, equal to those of a server that loaded the files. No model is loaded.

Torch is needed only where the server's dtype of a tensor differs from the file's.
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
    """``tensors`` is empty without details.

    A server reports ``aliases``, other names that it accepts for some tensors, and ``ignored``, patterns of names that
    it skips. ``cast`` counts the tensors of files that were digested in a server's dtype, by torch's names of the
    file's dtype and the server's.
    """

    sha256: str
    tensors: dict[str, TensorChecksum]
    aliases: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    cast: dict[tuple[str, str], int] = field(default_factory=dict)


Found = dict[str, tuple[StoredTensor, TensorFile]]
"""Every tensor of some files by name, with its file."""

Stored = Mapping[str, ModuleChecksum]
"""A server's modules by name, with details."""


def checksum(
    path: Path, modules: Sequence[str] = (), *, detail: bool = False, like: Stored | None = None
) -> dict[str, ModuleChecksum]:
    """Digest ``modules`` in ``path`` by name, as :func:`module_paths` finds them.

    With ``like``, a server's checksums, tensors get the server's names and dtypes. Raises ``InvalidRequest`` for
    missing modules and unreadable files.
    """
    found = module_paths(path, modules)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = pool.map(lambda name: _module(files_of(found[name]), detail, (like or {}).get(name)), found)
        return dict(zip(found, digests, strict=True))


def _module(files: list[Path], detail: bool, like: ModuleChecksum | None) -> ModuleChecksum:
    each: dict[str, TensorChecksum] = {}
    cast: dict[tuple[str, str], int] = {}
    with _opened(files) as found:
        whole = module_digest(_server_bytes(found, like, each if detail else None, cast))
    return ModuleChecksum(whole, each, cast=cast)


def _server_bytes(
    found: Found, like: ModuleChecksum | None, each: dict[str, TensorChecksum] | None, cast: dict[tuple[str, str], int]
) -> Iterator[tuple[str, memoryview]]:
    """Yield every tensor's name and bytes, sorted by name, in the server's dtype; fill ``each`` and ``cast``."""
    stored_as = {} if like is None else like.tensors
    names = {
        name if like is None else _server_name(name, found, like): name
        for name in found
        if like is None or not _is_ignored(name, like)
    }
    for name in sorted(names):
        stored, file = found[names[name]]
        dtype = STORED_DTYPES[stored_as[name].dtype] if name in stored_as else stored.dtype
        tensor = HostTensor(name, stored.dtype, stored.shape, file.data(stored.name)).cast(dtype)
        torch_dtype = TORCH_DTYPES[tensor.dtype]
        if each is not None:
            each[name] = TensorChecksum(tensor.digest(), torch_dtype, tensor.shape)
        if tensor.dtype != stored.dtype:
            kinds = TORCH_DTYPES[stored.dtype], torch_dtype
            cast[kinds] = cast.get(kinds, 0) + 1
        yield name, tensor.data


def _server_name(name: str, in_files: Container[str], like: ModuleChecksum) -> str:
    """The server's name for a file's tensor ``name``, unless the files have a tensor of that name too."""
    own = like.aliases.get(name, name)
    return name if name in like.tensors or own in in_files else own


def _is_ignored(name: str, like: ModuleChecksum) -> bool:
    """Return true if the server skips the tensor ``name`` when it loads files."""
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
