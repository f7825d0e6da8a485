"""Results of self-tests, kept on disk for later starts of the same model with the same software and hardware."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from ..protocol.config import Config
from ..protocol.self_test import SelfTestResult
from .model import Model
from .parallel.ranks import Ranks

log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "diffusers", "transformers")
_OPTIONS = ("batching", "max_batch", "max_batch_tokens", "tp", "fuse_projections", "variant")
"""The options that the self-test's result depends on, beside the model's files, its dtype and its device."""


class SelfTestCache:
    """The result that belongs to ``model`` as this software loads it; every rank reads what rank 0 does.

    Only a result that lets requests share forwards is kept: any other may have had a reason that passes, such as a
    device without memory, so that the next start finds out anew.
    """

    def __init__(self, model: Model, config: Config, ranks: Ranks) -> None:
        self._file = _directory() / f"{_key(model, config)}.json"
        self._ranks = ranks

    def read(self) -> SelfTestResult | None:
        """``None`` where nothing is kept, or what is kept cannot be read."""
        kept = self._ranks.exchange(self._kept() if self._ranks.rank == 0 else b"")[0]
        if not kept:
            return None
        log.info("the self-test's result comes from %s", self._file)
        return msgspec.json.decode(kept, type=SelfTestResult)

    def keep(self, result: SelfTestResult) -> None:
        """Of one rank. The file appears whole or not at all; a directory that cannot be written to is said once."""
        if result.mode != "merged":
            return
        new = self._file.with_suffix(f".{secrets.token_hex(8)}")
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new.write_bytes(msgspec.json.encode(result))
            new.replace(self._file)
        except OSError as error:
            log.info("the self-test's result cannot be kept for later starts: %s", error)

    def forget(self) -> None:
        """Remove what has turned out not to hold any more."""
        with contextlib.suppress(OSError):
            self._file.unlink()

    def _kept(self) -> bytes:
        try:
            kept = self._file.read_bytes()
            msgspec.json.decode(kept, type=SelfTestResult)
        except (OSError, msgspec.DecodeError):  # none, or of another version of this very file
            return b""
        return kept


def _directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "safelight" / "self-tests"


def _key(model: Model, config: Config) -> str:
    """Digest of whatever the result depends on."""
    digest = hashlib.sha256()
    for part in (*_software(), *_hardware(model.device), *_files(model), str(model.dtype)):
        digest.update(f"{part}\n".encode())
    for option in _OPTIONS:
        digest.update(f"{option}={getattr(config, option)}\n".encode())
    return digest.hexdigest()[:32]


def _software() -> Iterator[str]:
    """The libraries' versions, and Safelight's own sources of workers, which developers change."""
    for library in _LIBRARIES:
        yield f"{library}={importlib.metadata.version(library)}"
    yield f"python={platform.python_version()}"
    sources = Path(__file__).parent
    for source in sorted(sources.rglob("*.py")):
        yield hashlib.sha256(source.read_bytes()).hexdigest()


def _hardware(device: torch.device) -> Iterator[str]:
    yield device.type
    yield torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def _files(model: Model) -> Iterator[str]:
    """Size and time of every file of the checkpoint, wherever it lies: what an edit changes, and a copy keeps."""
    loaded = Path(model.path)
    if loaded.is_file():  # a single file; the directory is its base's
        yield _stat(loaded, loaded.name)
    for file in sorted(path for path in model.directory.rglob("*") if path.is_file()):
        yield _stat(file, str(file.relative_to(model.directory)))


def _stat(file: Path, name: str) -> str:
    found = file.stat()
    return f"{name} {found.st_size} {found.st_mtime_ns}"
