"""Each rank's part in the test that the ranks together hold a checkpoint; other processes can import it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from safelight.worker.parallel.families import family_of
from safelight.worker.parallel.plan import Family
from safelight.worker.parallel.ranks import Ranks
from safelight.worker.pipelines.components import DENOISERS
from safelight.worker.weights.checkpoint.components import component_classes
from safelight.worker.weights.checkpoint.files import WeightFiles
from safelight.worker.weights.checkpoint.loader import load_component
from safelight.worker.weights.checkpoint.pipeline import load_pipeline

CPU = torch.device("cpu")


def planned(checkpoint: Path) -> dict[str, tuple[type[Any], Family]]:
    found = {name: (cls, family_of(cls)) for name, cls in component_classes(checkpoint).items()}
    return {name: (cls, family) for name, (cls, family) in found.items() if family is not None}


def computes_with_its_part(ranks: Ranks, checkpoints: dict[str, Path]) -> None:
    """The layouts cover every module of the pipeline."""
    for checkpoint in checkpoints.values():
        loaded = load_pipeline(checkpoint, torch.float32, CPU, ranks, fused=False)
        pipeline, layouts = loaded.pipeline, loaded.layouts
        denoisers = [name for name in layouts if name in DENOISERS]
        assert denoisers
        for name in denoisers:
            divided = [entry for entry in layouts[name] if entry.shard is not None]
            assert divided
            for entry in divided:
                held = pipeline.components[name].get_parameter(entry.tensor).numel()
                assert held * ranks.size == torch.Size(entry.shape).numel(), (checkpoint.name, entry.name)


def reads_back(ranks: Ranks, checkpoints: dict[str, Path], fused: bool) -> None:
    for checkpoint in checkpoints.values():
        for name, (cls, family) in planned(checkpoint).items():
            folder = checkpoint / name
            loaded = load_component(
                cls, folder, dtype=torch.float32, device=CPU, family=family, ranks=ranks, fused=fused
            )
            with WeightFiles(folder) as files:
                assert [entry.name for entry in loaded.layout] == list(files)
                for tensor_name, whole in loaded.layout.tensors():
                    assert torch.equal(whole, files[tensor_name][...]), tensor_name
            divided = [entry for entry in loaded.layout if entry.shard is not None]
            assert divided or ranks.size == 1
            for entry in divided:
                assert loaded.layout.local(entry.name).numel() * ranks.size == torch.Size(entry.shape).numel()
            own = {id(p): p.numel() for p in loaded.module.parameters()}
            whole_size = sum(torch.Size(entry.shape).numel() for entry in loaded.layout if entry.shard is None)
            divided_size = sum(torch.Size(entry.shape).numel() for entry in divided)
            buffers = sum(b.numel() for n, b in loaded.module.named_buffers() if n in loaded.layout)
            assert sum(own.values()) + buffers <= whole_size + divided_size // ranks.size + 1, "a copy is left"
