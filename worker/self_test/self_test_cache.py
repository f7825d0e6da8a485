"""Self-test results on disk, for later starts of the same model with the same software and hardware."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from ...protocol.config import Config
from ...protocol.self_test import SelfTestResult
from ..model.model import Model
from ..parallel.ranks import Ranks

log = logging.getLogger(__name__)

_OWN_PACKAGES = ("worker", "protocol", "formats")
"""The packages of this project that a self-test runs."""

_VARIABLES = ("DIFFUSERS_", "TORCH_", "PYTORCH_", "TRANSFORMERS_", "CUBLAS_", "MKL_")
"""Prefixes of the environment variables with which libraries choose other kernels."""

_OPTIONS = (
    "attention_backend",
    "batching",
    "max_batch",
    "max_batch_tokens",
    "tp",
    "ulysses",
    "cfg_parallel",
    "fuse_projections",
    "quantize",
    "offload",
    "variant",
)
"""Options that the result depends on, besides the model's files, dtype and device."""


class SelfTestCache:
    """The cached result for ``model`` as this software loads it; rank 0 reads it and broadcasts it to the other ranks.

    Only results that allow merged forwards in every task are cached. Another result may have a transient cause, such as
    a lack of device memory, so the next start tests again.
    """

    def __init__(self, model: Model, config: Config, ranks: Ranks) -> None:
        self._ranks = ranks
        self._file: Path | None = None
        try:
            self._file = _directory() / f"{_key(model, config)}.json"
        except (OSError, RuntimeError) as error:  # files that just went, or a user without a home
            log.info("the self-test's result is neither looked for nor saved: %s", error)

    def read(self) -> SelfTestResult | None:
        """The cached result; ``None`` if there is none or it cannot be read."""
        content = self._ranks.all_gather_bytes(self._read_file() if self._ranks.rank == 0 else b"")[0]
        if not content:
            return None
        log.info("the self-test's result comes from %s", self._file)
        return msgspec.json.decode(content, type=SelfTestResult)

    def write(self, result: SelfTestResult) -> None:
        """Write the file atomically, on one rank. An unwritable directory is logged and otherwise ignored."""
        tasks = [task for task in (result.text, result.image) if task is not None]
        if self._file is None or result.incomplete or any(task.batching.mode != "merged" for task in tasks):
            return
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            result.write(self._file)
        except OSError as error:
            log.info("the self-test's result cannot be saved for later starts: %s", error)

    def remove(self) -> None:
        """Delete a result that proved to be wrong."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink()

    def _read_file(self) -> bytes:
        if self._file is None:
            return b""
        try:
            content = self._file.read_bytes()
            msgspec.json.decode(content, type=SelfTestResult)
        except (OSError, msgspec.DecodeError):  # no file, or one with another version's fields
            return b""
        return content


def _directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "safelight" / "self-tests"


def _key(model: Model, config: Config) -> str:
    """Digest of everything that the result depends on."""
    digest = hashlib.sha256()
    for part in (*_software(), *_hardware(model.device), *_files(model), str(model.dtype)):
        digest.update(f"{part}\n".encode())
    for option in _OPTIONS:
        digest.update(f"{option}={getattr(config, option)}\n".encode())
    return digest.hexdigest()[:32]


def _software() -> Iterator[str]:
    """The installed packages (pipelines import some late), and digests of our sources, which developers change.

    Packages are known by the names of their directories, as the metadata in one may be damaged.
    """
    yield f"python={platform.python_version()}"
    yield from sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(_VARIABLES))
    yield from sorted({package.name for place in sys.path for package in Path(place).glob("*.dist-info")})
    root = Path(__file__).parents[2]
    for source in sorted(source for package in _OWN_PACKAGES for source in (root / package).rglob("*.py")):
        yield hashlib.sha256(source.read_bytes()).hexdigest()


def _hardware(device: torch.device) -> Iterator[str]:
    yield device.type
    yield torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def _files(model: Model) -> Iterator[str]:
    """Size and modification time of every checkpoint file; an edit changes them, a copy to another path keeps them."""
    loaded = Path(model.path)
    if loaded.is_file():  # a single file; the directory is its base pipeline's
        yield _stat(loaded, loaded.name)
    for file in sorted(path for path in model.directory.rglob("*") if path.is_file()):
        yield _stat(file, str(file.relative_to(model.directory)))


def _stat(file: Path, name: str) -> str:
    status = file.stat()
    return f"{name} {status.st_size} {status.st_mtime_ns}"
