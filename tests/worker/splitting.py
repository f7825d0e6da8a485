"""Each rank's part in tests of sequence parallelism; in a module that other processes can import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safelight.protocol.adapters import SetAdapters
from safelight.protocol.config import Config
from safelight.protocol.generation import Generate
from safelight.tests.worker.lora import agreement
from safelight.worker.model.model import Model, load_model
from safelight.worker.model.modules import modules
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.pipelines.components import DENOISERS
from safelight.worker.weights.snapshot.digests import module_digests

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Drawn:
    """Requests of a family with what one rank drew for each, and its digests of all components."""

    checkpoint: Path
    requests: list[Generate]
    pictures: list[torch.Tensor]
    digests: Mapping[str, str]
    adapters: Sequence[Path] = ()


def draws_as_one_rank(mesh: Mesh, families: Sequence[Drawn]) -> None:
    for drawn in families:
        config = Config(model=str(drawn.checkpoint), device="cpu", tp=mesh.tp.size, ulysses=mesh.axis("sp").size)
        model = load_model(config, CPU, mesh.tp, mesh.axis("sp"))
        _draws_alike(mesh, model, drawn)
        digests, _ = module_digests(model.layouts, mesh.world, lambda: None)
        assert all(one == drawn.digests for one in digests), "every rank has the whole's weights"


def _draws_alike(mesh: Mesh, model: Model, drawn: Drawn) -> None:
    adapters = agreement.new_adapters(model, mesh.world)
    if drawn.adapters:
        sources = [agreement.source(folder) for folder in drawn.adapters]
        names = [one.nickname for one in sources]
        agreement.change(
            adapters, SetAdapters(nicknames=names, strengths=[1.0] * len(names), mode="request", sources=sources)
        )
    batcher, lengths = agreement.new_batcher(adapters), TokenCount(model)
    pictures = agreement.draw(model, batcher, adapters, drawn.requests)
    counters = batcher.runner.counters
    assert counters.forwards < counters.calls, "requests meet"
    for found, wanted in zip(pictures, drawn.pictures, strict=True):
        assert agreement.distance(found, wanted) < 1e-5, drawn.checkpoint.name
    sp = mesh.axis("sp")
    whole = torch.stack(sp.all_gather(torch.tensor(lengths.found))).sum(dim=0).tolist()
    assert lengths.found == [len(torch.arange(n).tensor_split(sp.size)[sp.rank]) for n in whole], "its part alone"


class TokenCount:
    """The tokens that the last layer of the denoisers had on this rank, in each forward."""

    def __init__(self, model: Model) -> None:
        self.found: list[int] = []
        for name, module in modules(model.pipeline).items():
            if name in DENOISERS:
                part: Any = module
                last: nn.Module = part.proj_out
                last.register_forward_pre_hook(lambda _, args: self.found.append(args[0].shape[1]))
