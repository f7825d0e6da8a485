"""Snapshots take no more memory than one for each replica, however often a replica is lost before it reads its own."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from safelight.worker.parallel.ranks import Ranks
from safelight.worker.weights.checkpoint.layout import Entry, Layout
from safelight.worker.weights.snapshot.snapshot import write_snapshot


def layout(value: float) -> Layout:
    module = nn.Module()
    module.register_buffer("weight", torch.full((1000,), value))
    return Layout(module, [Entry("weight", "weight", (1000,))], Ranks())


def test_a_snapshot_that_nobody_has_read_is_replaced_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "replica-1"
    write_snapshot({"transformer": layout(1), "vae": layout(1)}, ["transformer", "vae"], folder, Ranks(), lambda: None)
    write_snapshot({"transformer": layout(2)}, ["transformer"], folder, Ranks(), lambda: None)
    assert [file.name for file in folder.iterdir()] == ["transformer.safetensors"]
    assert torch.equal(load_file(folder / "transformer.safetensors")["weight"], torch.full((1000,), 2.0))


def test_a_snapshot_that_finds_no_room_leaves_nothing_in_it(tmp_path: Path) -> None:
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, usual[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_snapshot({"transformer": layout(1)}, ["transformer"], tmp_path / "replica-1", Ranks(), lambda: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert not list(tmp_path.iterdir())
