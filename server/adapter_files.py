"""Adapter files, found where weights may be read from, and copied: every rank reads the same bytes at any time."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

from ..formats.model_names import resolve_model
from ..formats.tensor_files import BadTensorFile, read_head
from ..protocol.adapters import ADAPTER_CONFIG, ADAPTER_FILE, ALL, AdapterSource, SetAdapters
from ..protocol.config import Config
from ..protocol.errors import InvalidRequest, NotFound, SafelightError, StartFailed, Unavailable
from .checkpoint_files import find_path

_FIELD = "lora_path"
_USUAL = (ADAPTER_FILE, "pytorch_lora_weights.safetensors")
_LARGEST_CONFIG = 1 << 20
_TOGETHER = 4 << 20


def first_adapters(config: Config, shared: Path) -> SetAdapters | None:
    """The adapters of ``--lora``. Raises ``StartFailed``."""
    if not config.lora:
        return None
    pairs = [part.partition("=") for part in config.lora.split(",")]
    if not all(name and path for name, _, path in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise StartFailed(f"--lora is {config.lora!r}; it must be name=path, and further ones after commas.")
    try:
        sources = [copy_adapter(path, name, new_folder(shared), config) for name, _, path in pairs]
    except SafelightError as error:
        raise StartFailed(f"--lora cannot be used: {error.message}") from None
    return SetAdapters(
        nicknames=[source.nickname for source in sources],
        strengths=[1.0] * len(sources),
        mode=config.lora_mode,
        sources=sources,
    )


def new_folder(shared: Path) -> Path:
    """Where an adapter can be kept; it is not there yet."""
    return shared / f"adapter-{secrets.token_hex(8)}"


def copy_adapter(
    path: str,
    nickname: str,
    folder: Path,
    config: Config,
    *,
    alpha: float | None = None,
    target: str = ALL,
    strict: bool = True,
) -> AdapterSource:
    """A copy of the adapter at ``path``, a safetensors file or a directory with one, in ``folder``, which is made.

    Raises ``NotFound``, ``Forbidden`` outside the roots that the server allows, ``InvalidRequest`` for what is not a
    safetensors file, and ``Unavailable`` where there is no room; nothing is left then.
    """
    try:
        found = find_path(path, config, field=_FIELD)
        local, file = isinstance(resolve_model(path), Path), _file_in(found)
        if local:  # a link in it may lead elsewhere; those of a download lead to its cache
            file = find_path(str(file), config, field=_FIELD)
        beside = found / ADAPTER_CONFIG if found.is_dir() else found.parent / ADAPTER_CONFIG
        configured = beside.exists() and (found.is_dir() or found.name == ADAPTER_FILE)
        settings = (find_path(str(beside), config, field=_FIELD) if local else beside) if configured else None
    except (OSError, ValueError, RuntimeError) as error:
        raise NotFound(f"There is nothing at {path[:200]} ({type(error).__name__}).", field=_FIELD) from None
    try:
        folder.mkdir(mode=0o700)
        digest = hashlib.sha256(repr((alpha, strict)).encode())
        _copy(file, folder / ADAPTER_FILE, config.max_lora_mb * 1_000_000, digest)
        if settings is not None:
            _copy(settings, folder / ADAPTER_CONFIG, _LARGEST_CONFIG, digest)
        return AdapterSource(nickname, path, str(folder), digest.hexdigest(), alpha, target=target, strict=strict)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, BadTensorFile):
            raise InvalidRequest(f"{path[:200]} is not a safetensors file: {error}.", field=_FIELD) from None
        if isinstance(error, OSError):
            raise Unavailable(f"The adapter could not be kept in shared memory: {error.strerror or error}.") from error
        raise


def _file_in(found: Path) -> Path:
    if not found.is_dir():
        files = [found]
    else:
        files = [found / name for name in _USUAL if (found / name).is_file()] or sorted(found.glob("*.safetensors"))
    if not files:
        raise NotFound(f"{found} has no safetensors file, and nothing else is read.", field=_FIELD)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise InvalidRequest(f"{found} has several files ({names}); name one of them.", field=_FIELD)
    if files[0].suffix != ".safetensors":
        raise InvalidRequest(f"{found} is no .safetensors file, and nothing else is read.", field=_FIELD)
    return files[0]


def _copy(source: Path, target: Path, most: int, digest: hashlib._Hash) -> None:
    with _opened(source) as read, target.open("xb") as written:
        size = os.fstat(read.fileno()).st_size
        if size > most:
            raise InvalidRequest(
                f"{source.name} has {-(-size // 1_000_000)} MB; at most {most // 1_000_000} MB are allowed.",
                field=_FIELD,
            )
        if target.suffix == ".safetensors":
            read_head(read, size)  # before anything of it is copied
            read.seek(0)
        while data := read.read(_TOGETHER):
            digest.update(data)
            written.write(data)


def _opened(path: Path) -> BinaryIO:
    """A regular file. Raises ``NotFound`` and ``InvalidRequest``."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        )  # O_NONBLOCK: a FIFO without a writer would block
    except OSError as error:
        raise NotFound(f"{path.name[:200]} cannot be read: {error.strerror}.", field=_FIELD) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidRequest(f"{path.name[:200]} is not a regular file.", field=_FIELD)
    return os.fdopen(descriptor, "rb")
