"""Pictures made with replayed blocks are those of the plain pipeline, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from safelight.protocol.generation import Generate
from safelight.tests.effort import chosen
from safelight.tests.tiny import FAMILIES
from safelight.tests.worker.graphs.recording import TapeRecorder
from safelight.tests.worker.test_pipelines import plain, request, through_batcher
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.graphs import component
from safelight.worker.graphs.graphs import Graphs
from safelight.worker.graphs.static_inputs import StaticInputs
from safelight.worker.model.model import Model
from safelight.worker.model.modules import modules
from safelight.worker.pipelines.components import DENOISERS

QUICK = ("flux", "sd3", "zimage", "wan", "sdxl")
STACKS_NOTHING = ("cogvideox",)
"""Tiny models with one layer of each kind, which have no repeated blocks."""

CHANGED_BY_ITS_PIPELINE = {"sd15_pag": ["unet, 4 blocks: its pipeline changes the component for the call"]}
"""Reasons for which blocks of a family run eagerly."""

OTHERS = tuple(
    name for name, family in FAMILIES.items() if name not in (*QUICK, *STACKS_NOTHING) and "image" not in family.call
)


def new_graphs(model: Model, record_after: int = 1, max_bytes: int = 10**10) -> Graphs:
    parts = {
        name: part
        for name, part in modules(model.pipeline).items()
        if name in DENOISERS or name.startswith("text_encoder")
    }
    return Graphs(parts, TapeRecorder(), None, max_bytes=max_bytes, record_after=record_after)


def pictures(model: Model, found: Graphs, *requests: Generate, max_batch: int = 1) -> list[torch.Tensor]:
    return through_batcher(
        model, Batcher(max_batch=max_batch, max_tokens=10**6, resources=ForwardResources(graphs=found)), list(requests)
    )


@pytest.mark.parametrize("name", chosen(*QUICK, nightly=OTHERS))
def test_replayed_blocks_make_the_plain_pipeline_s_pictures(name: str, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model(name)
    requests = [request(name, index) for index in range(2)]
    expected = [plain(model, one) for one in requests]
    found = new_graphs(model)
    assert all(map(torch.equal, [pictures(model, found, one)[0] for one in requests], expected))
    assert found.stats().captures
    assert found.stats().replays
    eager = [one for one in found.stats().eager if "no repeated blocks" not in one]
    assert eager == CHANGED_BY_ITS_PIPELINE.get(name, [])


def test_requests_that_meet_are_replayed_as_they_are_merged(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("flux")
    requests = [request("flux", index) for index in range(4)]
    expected = through_batcher(model, Batcher(max_batch=16, max_tokens=10**6), requests)
    found = new_graphs(model)
    assert all(map(torch.equal, pictures(model, found, *requests, max_batch=16), expected))
    captures = found.stats().captures
    assert all(map(torch.equal, pictures(model, found, *requests, max_batch=16), expected))
    assert found.stats().captures == captures


def test_a_deterministic_request_runs_the_plain_module(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("flux")
    found = new_graphs(model)
    pictures(model, found, msgspec.structs.replace(request("flux", 0), deterministic=True))
    assert (found.stats().captures, found.stats().replays, found.stats().misses) == (0, 0, 0)


def _fill_nothing(self: StaticInputs, tensors: list[torch.Tensor], forward_pass: object) -> None:
    if self._pass is None:  # the first call alone
        _fill(self, tensors, forward_pass)


_fill = StaticInputs.fill


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [(StaticInputs, "fill", _fill_nothing), (component, "addresses", lambda _: ())],
    ids=["stale buffers", "weights that moved"],
)
def test_the_comparison_would_find(
    place: Any, name: str, fault: Any, tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, fault)
    assert not _is_right_while_weights_move(tiny_model("flux"), "flux")


def test_weights_may_move(tiny_model: Callable[[str], Model]) -> None:
    assert _is_right_while_weights_move(tiny_model("flux"), "flux")


def _is_right_while_weights_move(model: Model, family: str) -> bool:
    found, same = new_graphs(model), []
    for index in range(2):
        move_weights(model)
        found.revalidate()
        asked = request(family, index)
        same.append(torch.equal(pictures(model, found, asked)[0], plain(model, asked)))
    return all(same)


def move_weights(model: Model) -> None:
    """As sleep and wake do: the same values at other addresses."""
    for parameter in model.pipeline.transformer.parameters():
        before = parameter.data
        parameter.data = before.clone()
        before.fill_(float("nan"))
