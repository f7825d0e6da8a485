"""Each rank's part in tests of sequence parallelism; in a module that other processes can import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from safelight.protocol.adapters import SetAdapters, Use
from safelight.protocol.config import Config
from safelight.protocol.generation import Generate
from safelight.tests.tiny import save
from safelight.tests.worker.lora import agreement
from safelight.worker.forward.batch import Forward
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.row_division import RowDivision
from safelight.worker.forward.runner import Counters
from safelight.worker.lora.rank_adapters import RankAdapters
from safelight.worker.model.model import Model, load_model
from safelight.worker.model.modules import modules
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.pipelines.components import DENOISERS
from safelight.worker.requests.outputs import first_output
from safelight.worker.weights.snapshot.digests import module_digests

CPU = torch.device("cpu")


OTHER: dict[str, dict[str, Any]] = {
    "sd3": {},
    "zimage": {},
    "flux": {"extra": {"max_sequence_length": 33}},
    "qwenimage": {"width": 48, "height": 48},
    "wan": {"width": 16, "height": 16, "num_frames": 1},
    "flux2": {"width": 48, "height": 48},
    "wan22": {"width": 16, "height": 16, "num_frames": 1},
}
"""Changes of a request, with which two ranks have unequal parts of a sequence where the pipeline allows any."""


@dataclass(frozen=True)
class Drawn:
    """Requests of a family with what one rank drew for each, and its digests of all components."""

    checkpoint: Path
    requests: list[Generate]
    pictures: list[torch.Tensor]
    digests: Mapping[str, str]
    adapters: Sequence[Path] = ()


def drawn_by_one_rank(name: str, directory: Path) -> Drawn:
    """Two requests that meet and a third one, drawn by one rank; for FLUX also one whose adapter is in every layer."""
    checkpoint = save(name, directory)
    model = load_model(Config(model=str(checkpoint), device="cpu"))
    requests = [agreement.request(name, index) for index in range(2)]
    requests.append(msgspec.structs.replace(agreement.request(name, 2), **OTHER[name]))
    adapters = agreement.new_adapters(model)
    folders = []
    if name == "flux":
        made = agreement.Made("wide", 4, 4.0)
        folders = [agreement.write_adapter(made, model.pipeline.transformer, directory / "adapters")]
        sources = [agreement.source(folder) for folder in folders]
        agreement.change(adapters, SetAdapters(nicknames=["wide"], strengths=[1.0], mode="request", sources=sources))
        requests += [msgspec.structs.replace(agreement.request(name, 3), lora=[Use("wide", 0.8)])]
        pictures = agreement.draw(model, agreement.new_batcher(adapters), adapters, requests)
    else:
        pictures = [first_output(model.main.pipeline(**agreement.arguments(model, asked))) for asked in requests]
    digests, _ = module_digests(model.layouts, agreement.ALONE, lambda: None)
    return Drawn(checkpoint, requests, pictures, digests[0], folders)


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
    batcher, counted = new_batcher(mesh, adapters), Counted(model)
    pictures = agreement.draw(model, batcher, adapters, drawn.requests)
    counters = batcher.runner.counters
    assert counters.forwards < counters.calls, "requests meet"
    for found, wanted in zip(pictures, drawn.pictures, strict=True):
        assert agreement.distance(found, wanted) < 1e-5, drawn.checkpoint.name
    sp = mesh.axis("sp")
    whole = torch.stack(sp.all_gather(torch.tensor(counted.tokens))).sum(dim=0).tolist()
    assert counted.tokens == [len(torch.arange(n).tensor_split(sp.size)[sp.rank]) for n in whole], "its part alone"
    division = batcher.resources.division
    if isinstance(division, Watched):
        assert counted.rows == division.own, "half of the rows of each forward"
        assert max(division.rows) > max(division.own)


def new_batcher(mesh: Mesh, adapters: RankAdapters) -> Batcher:
    division = RowDivision.of(mesh)
    return agreement.new_batcher(adapters, division=None if division is None else Watched(division))


class Watched:
    """Keeps the rows of the denoisers' forwards, and those that this rank should compute; a probe is not divided."""

    name = "watched"

    def __init__(self, division: RowDivision) -> None:
        self.rows: list[int] = []
        self.own: list[int] = []
        self._division = division

    def answers(self, forward: Forward, run: Callable[[Forward], list[Any]], counters: Counters) -> list[Any]:
        if forward.component in DENOISERS:
            self.rows.append(sum(part.rows for part in forward.parts))
            self.own.append(self.rows[-1] if forward.probe else -(-self.rows[-1] // 2))
        return self._division.answers(forward, run, counters)


class Counted:
    """The rows of the denoisers' forwards on this rank, and the tokens that their last layer had."""

    def __init__(self, model: Model) -> None:
        self.tokens: list[int] = []
        self.rows: list[int] = []
        for name, module in modules(model.pipeline).items():
            if name in DENOISERS:
                module.register_forward_pre_hook(self._count_rows, with_kwargs=True)
                last = dict(module.named_children()).get("proj_out", module)
                last.register_forward_pre_hook(self._count_tokens)

    def _count_rows(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows.append(len(next(iter((*args, *kwargs.values())))))

    def _count_tokens(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            self.tokens.append(args[0].shape[1])
