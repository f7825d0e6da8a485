"""Each rank's part in the tests of tiny families; in a module that other processes can import."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch import nn

from safelight.protocol.config import Config
from safelight.tests.effort import NIGHTLY
from safelight.worker.accuracy import compare
from safelight.worker.accuracy.compare import ComparisonSetting, Outputs, Sides
from safelight.worker.accuracy.policy import load_policy
from safelight.worker.accuracy.recorded import Recorded, read, write
from safelight.worker.accuracy.recorder import record
from safelight.worker.accuracy.report import ReportRow
from safelight.worker.accuracy.sides import Component
from safelight.worker.accuracy.task import DTYPES, DType
from safelight.worker.accuracy.verification import Checkpoint
from safelight.worker.model.model import load_model
from safelight.worker.parallel.families import family_of
from safelight.worker.parallel.ranks import Ranks
from safelight.worker.weights.checkpoint.components import component_classes

NAMES = (
    "flux", "flux2", "sd3", "qwenimage", "qwenimage_edit", "zimage", "wan", "wan22", "hunyuan_video",
    "hunyuan_video15", "ltx",
)  # fmt: skip

CPU = torch.device("cpu")

Found = dict[str, list[ReportRow]]
"""Rows by :func:`key`."""


def cases(tp: int) -> list[tuple[bool, DType]]:
    """The fusing of projections, and the dtype, of each comparison over ``tp`` ranks.

    How parts are laid out does not depend on the dtype, so that not every run has all pairs.
    """
    in_every_run: dict[int, list[tuple[bool, DType]]] = {
        1: [(False, "float32"), (True, "float32")],
        2: [(False, "float32"), (True, "bfloat16")],
        4: [(True, "float32")],
    }
    return [(fused, dtype) for fused in (False, True) for dtype in DTYPES] if NIGHTLY else in_every_run[tp]


def compared(checkpoint: Path, *, alone: bool) -> dict[str, type[nn.Module]]:
    """The components to compare: those that are loaded otherwise than one rank alone loads them, or ``alone`` all.

    The image-to-image pipeline draws a megapixel whatever is asked for; its VAE is that of the other one.
    """
    components = component_classes(checkpoint) if alone else planned(checkpoint)
    return {name: cls for name, cls in components.items() if (checkpoint.name, name) != ("qwenimage_edit", "vae")}


def key(name: str, fused: bool, dtype: str) -> str:
    return f"{name} {fused} {dtype}"


def recorded(checkpoint: Path, dtype: DType) -> list[Recorded]:
    """The pipeline's calls, made once and kept beside the checkpoint."""
    folder = checkpoint.parent / f"{checkpoint.name}-{dtype}"
    if not folder.exists():
        write(record(load_model(Config(model=str(checkpoint), dtype=dtype, device="cpu"))), folder)
    return read(folder)


def planned(checkpoint: Path) -> dict[str, type[nn.Module]]:
    return {name: cls for name, cls in component_classes(checkpoint).items() if family_of(cls) is not None}


def rows(
    ranks: Ranks,
    checkpoint: Path,
    components: Mapping[str, type[nn.Module]],
    dtype: DType,
    *,
    fused: bool = False,
    staged: bool | None = None,
) -> list[ReportRow]:
    compared = Checkpoint(checkpoint, load_policy(), ranks, CPU, fused, staged)
    return list(compared.rows(components, recorded(checkpoint, dtype), dtype))


def keep_references(folder: Path) -> None:
    """They are the same for any degree, fused or not: let the next comparison find in ``folder`` what one has made."""
    make = compare.references

    def kept(component: Component, sides: Sides, setting: ComparisonSetting) -> tuple[Outputs | None, Outputs]:
        file = folder / f"{component.directory.name}-{component.name}-{setting.dtype}.pt"
        if not file.exists():
            torch.save(make(component, sides, setting), file)
        found: tuple[Outputs | None, Outputs] = torch.load(file, weights_only=True)
        return found

    compare.references = kept


def verify_families(ranks: Ranks, checkpoints: Sequence[Path], result: Path) -> None:
    """Write the rows of all components that are loaded otherwise than one rank alone loads them.

    Alone and not fused, those are all components, as the others are loaded in one way only.
    """
    gc.freeze()
    keep_references(checkpoints[0].parent)
    found: Found = {}
    for checkpoint in checkpoints:
        for fused, dtype in cases(ranks.size):
            components = compared(checkpoint, alone=ranks.size == 1 and not fused)
            found[key(checkpoint.name, fused, dtype)] = rows(ranks, checkpoint, components, dtype, fused=fused)
    if ranks.rank == 0:
        result.write_bytes(msgspec.msgpack.encode(found))
