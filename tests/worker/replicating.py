"""Each rank's part in tests of models that a degree does not divide; in a module that other processes can import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from safelight.formats.digests import tensor_digest
from safelight.formats.model_names import EMBEDDED, resolve_model
from safelight.protocol.config import Config
from safelight.worker.model.model import load_model
from safelight.worker.parallel.families import family_of
from safelight.worker.parallel.ranks import Ranks
from safelight.worker.weights.checkpoint.loader import LoadedComponent, load_component
from safelight.worker.weights.snapshot.digests import raw_bytes, tensor_digests

CPU = torch.device("cpu")


def divides_what_it_can(ranks: Ranks, encoders: Mapping[str, tuple[type[Any], Path, set[str]]]) -> None:
    """One start of all ranks for both, since starting takes longer than either."""
    _computes_as_whole(ranks, encoders)
    _embedded_models_are_divided(ranks)


def _computes_as_whole(ranks: Ranks, encoders: Mapping[str, tuple[type[Any], Path, set[str]]]) -> None:
    """Load each text encoder, compare what it computes, change all of its tensors, and take their digests."""
    ids = torch.tensor([[3, 5, 8, 1, 0, 6], [2, 2, 7, 9, 4, 1]])
    for called, (cls, folder, whole) in encoders.items():
        for fused in (False, True):
            loaded = load_component(
                cls, folder, dtype=torch.float32, device=CPU, family=family_of(cls), ranks=ranks, fused=fused
            )
            assert set(loaded.whole) == whole, called
            plain = cls.from_pretrained(folder)
            found, wanted = loaded.module(ids)[0], plain(ids)[0]
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (called, fused)
        _takes_updates(loaded, folder, ranks)


def _takes_updates(loaded: LoadedComponent, folder: Path, ranks: Ranks) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        loaded.layout.write(name, tensor + 1)
    digests = tensor_digests(loaded.layout, list(tensors), lambda: None)
    for name, tensor in tensors.items():
        changed = (tensor + 1).contiguous()
        assert digests[name].sha256 == tensor_digest("torch.float32", changed.shape, raw_bytes(changed)), name


def _embedded_models_are_divided(ranks: Ranks) -> None:
    for name in EMBEDDED:
        model = load_model(Config(model=name, device="cpu", dtype="float32", tp=ranks.size), CPU, ranks)
        said = model.info().divided
        assert said.keys() == model.layouts.keys()
        assert said["transformer"] == "divided among 2 ranks"
        assert "whole on every rank: there is no tensor-parallel plan" in said["vae"]
        directory = resolve_model(name)
        assert isinstance(directory, Path)
        for component, layout in model.layouts.items():
            (file,) = (directory / component).glob("*.safetensors")
            tensors = load_file(file)
            assert {entry.name for entry in layout} == tensors.keys()
            assert [n for n, t in tensors.items() if not torch.equal(layout.read(n), t.float())] == []
