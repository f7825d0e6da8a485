"""Tiny random-weight forms of diffusers pipelines, as ordinary checkpoints on disk.

`save("flux", directory)` writes one; `DiffusionPipeline.from_pretrained` loads it; `FAMILIES["flux"].call` are
the keyword arguments of a quick call. Nothing is downloaded.
"""

import functools
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .animatediff import ANIMATEDIFF
from .auraflow import AURAFLOW
from .chroma import CHROMA
from .cogvideox import COGVIDEOX
from .family import Family
from .flux import FLUX
from .flux2 import FLUX2, FLUX2_KV
from .hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO
from .hunyuan15 import HUNYUAN_VIDEO15
from .ltx import LTX
from .lumina2 import LUMINA2
from .pixart import PIXART
from .qwenimage import QWENIMAGE, QWENIMAGE_EDIT
from .sana import SANA
from .sd3 import SD3, SD3_PAG
from .stable_diffusion import SD15, SD15_PAG, SDXL
from .wan import WAN, WAN22
from .zimage import ZIMAGE

__all__ = ["FAMILIES", "LIVE_FAMILIES", "Family", "save"]

_IMAGE = (FLUX, SD3, ZIMAGE, QWENIMAGE, SDXL, SD15, PIXART, SANA, FLUX2, CHROMA, AURAFLOW, LUMINA2, QWENIMAGE_EDIT)
_VIDEO = (WAN, WAN22, LTX, COGVIDEOX, HUNYUAN_VIDEO, HUNYUAN_VIDEO15)
_TROUBLESOME = (SD15_PAG, SD3_PAG, HUNYUAN_IMAGE, FLUX2_KV, ANIMATEDIFF)

FAMILIES: dict[str, Family] = {family.name: family for family in (*_IMAGE, *_VIDEO, *_TROUBLESOME)}
"""All tiny families by name."""

LIVE_FAMILIES = ("flux", "sd3", "zimage", "qwenimage", "wan", "ltx", "sdxl", "pixart", "sana")
"""Families that live servers draw beside plain diffusers in every run."""


def save(name: str, directory: Path) -> Path:
    """Save the family's pipeline as `directory / name`, unless it is there already.

    It is built once on a machine and copied from there. A checkpoint appears in one rename, so a directory that
    exists is complete, also when several processes save at once.

    Returns:
        The checkpoint's directory.
    """
    target = directory / name
    if not target.exists():
        with _scratch(directory) as scratch:
            _publish(Path(shutil.copytree(_built(name), scratch / name)), target)
    return target


def _built(name: str) -> Path:
    """The family's checkpoint in the directory that all runs of this version share."""
    target = _shared_directory() / name
    if not target.exists():
        with _scratch(target.parent) as scratch:
            FAMILIES[name].build().save_pretrained(scratch / name, safe_serialization=True)
            _publish(scratch / name, target)
    return target


@functools.cache
def _shared_directory() -> Path:
    """A directory for this user and for exactly these sources and libraries."""
    known = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        known.update(source.read_bytes())
    for library in ("torch", "diffusers", "transformers", "safetensors"):
        known.update(importlib.metadata.version(library).encode())
    return Path(tempfile.gettempdir()) / f"tiny-checkpoints-{os.getuid()}-{known.hexdigest()[:16]}"


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        yield Path(scratch)


def _publish(checkpoint: Path, target: Path) -> None:
    """Move the checkpoint to its final path, unless another process has already put one there."""
    try:
        checkpoint.rename(target)
    except OSError:
        if not target.exists():
            raise
