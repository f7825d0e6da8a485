"""When a block is recorded, replayed and run eagerly, and that each gives what the plain block gives."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from safelight.protocol.errors import StartFailed
from safelight.tests.worker.graphs.recording import TapeRecorder
from safelight.tests.worker.graphs.toy import Block, Extra, Run, Toy, rows
from safelight.worker.crossing.call import Call, cross
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.graphs import GraphMiss
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.graphs import component, graphs
from safelight.worker.graphs.graphs import Graphs
from safelight.worker.graphs.recorded_call import RecordedCall
from safelight.worker.parallel.ranks import Ranks


def test_a_call_without_an_image_sees_none_of_the_one_before() -> None:
    run = Run()
    for _ in range(2):
        assert run.is_right(rows(1), image=rows(2))
        assert run.is_right(rows(3))
        assert run.is_right(rows(4), image=rows(5))
    assert run.counts == (4, 8, 0), "both shapes have graphs of their own"


def test_a_constant_is_part_of_the_signature() -> None:
    run = Run()
    assert all(run.is_right(rows(seed), scale=scale) for seed in range(2) for scale in (1.0, 0.5, 1))
    assert run.counts[0] == 6


def test_a_signature_without_constants_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    read = component.read_arguments

    def without_constants(*given: Any) -> Any:
        found = read(*given)
        marks = tuple(mark if mark[0] is torch.Tensor else (mark[0],) for mark in found.signature)
        return replace(found, signature=marks)

    monkeypatch.setattr(component, "read_arguments", without_constants)
    run = Run()
    assert run.is_right(rows(0), scale=1.0)
    assert not run.is_right(rows(0), scale=0.5)


def test_a_shape_is_recorded_once_it_comes_again() -> None:
    run = Run(record_after=3)
    assert [run.is_right(rows(seed)) for seed in range(4)] == [True] * 4
    assert run.counts == (2, 2, 4)


def test_rows_that_meet_have_graphs_of_their_own_number() -> None:
    run = Run()
    answers = run(*[run.call(rows(seed)) for seed in range(3)])
    merged = run.plain(torch.cat([rows(seed) for seed in range(3)]))
    assert all(torch.equal(answer, merged[index : index + 1]) for index, answer in enumerate(answers))
    assert run.is_right(rows(7))
    assert run.counts[0] == 4


def test_an_answer_stays_as_it_is_when_the_next_forward_replays() -> None:
    run = Run()
    first = run(run.call(rows(1)))[0]
    before = first.clone()
    run(run.call(rows(2)))
    assert torch.equal(first, before)


def test_an_answer_in_the_memory_of_a_graph_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_own", lambda answer, _: answer)
    monkeypatch.setattr(RecordedCall, "is_held", False)
    run = Run()
    first = run(run.call(rows(1)))[0]
    before = first.clone()
    run(run.call(rows(2)))
    assert not torch.equal(first, before)


def test_what_a_component_keeps_of_a_block_is_not_overwritten() -> None:
    run = Run()
    kept: list[torch.Tensor] = []
    run.toy.blocks[0].register_forward_hook(lambda _module, _args, output: kept.append(output))
    for seed in range(3):
        assert run.is_right(rows(seed))
    first = run.plain.blocks[0]
    assert all(torch.equal(one, first(rows(seed))) for seed, one in enumerate(kept))
    assert run.graphs.stats().eager == ["transformer, 1 blocks: what it returned before is still in use"]


def test_weights_that_are_written_in_place_are_seen() -> None:
    run = Run()
    for seed in range(3):
        for toy in (run.toy, run.plain):
            toy.blocks[0].linear.weight.mul_(1.5)
        assert run.is_right(rows(seed))
    assert run.counts[0] == 2


def test_weights_that_lie_elsewhere_are_recorded_again() -> None:
    run = Run()
    assert run.is_right(rows(0))
    weight = run.toy.blocks[1].linear.weight
    with run.batcher.aside():
        before = weight.data
        weight.data = before.clone()
        before.fill_(float("nan"))
    assert run.is_right(rows(1))
    assert run.counts[0] == 4
    with run.batcher.aside():
        pass
    assert run.is_right(rows(2))
    assert run.counts[0] == 4, "an operation that moves nothing leaves graphs as they are"


def test_a_block_that_returns_its_argument_hands_out_no_static_memory() -> None:
    run = Run(lambda _block, _y, x: x)
    answers = [run(run.call(rows(seed)))[0] for seed in range(3)]
    assert all(torch.equal(one, rows(seed)) for seed, one in enumerate(answers))
    assert run.counts == (2, 4, 0)


def _waits(_: Block, y: torch.Tensor, _x: torch.Tensor) -> torch.Tensor:
    return y if y.sum().item() > 1e9 else y + 1


def _draws(_: Block, y: torch.Tensor, _x: torch.Tensor) -> torch.Tensor:
    return y + torch.rand(4)


def _counts(block: Block, y: torch.Tensor, _x: torch.Tensor) -> torch.Tensor:
    block.calls.add_(1)  # type: ignore[operator, union-attr]
    return y * block.calls  # type: ignore[operator]


def _remembers(block: Block, y: torch.Tensor, _x: torch.Tensor) -> torch.Tensor:
    block.attribute += 1
    return y * block.attribute


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (_waits, "its capture failed: CUDA error: operation not permitted when stream is capturing"),
        (_draws, "it draws random numbers"),
        (_counts, "it writes to its weights or buffers"),
        (_remembers, "it writes to the attribute attribute of Block"),
    ],
    ids=["waits", "draws", "writes to a buffer", "writes to an attribute"],
)
def test_a_block_that_is_not_a_function_of_its_arguments_runs_eagerly(extra: Extra, reason: str) -> None:
    run = Run(extra)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = run.plain(rows(seed))
        assert torch.equal(run(run.call(rows(seed)), seed=seed)[0], expected)
    (why,) = run.graphs.stats().eager
    assert reason in why
    assert run.counts[:2] == (0, 0)


def test_a_block_that_writes_to_its_argument_runs_eagerly() -> None:
    run = Run()
    for toy in (run.toy, run.plain):
        toy.blocks[0].linear = _InPlace()
    for seed in range(3):
        x, y = rows(seed), rows(seed)
        assert torch.equal(run(run.call(x))[0], run.plain(y))
        assert torch.equal(x, y), "the caller's tensor is written to"
    assert run.graphs.stats().eager == ["transformer, 1 blocks: it writes to its arguments"]


class _InPlace(nn.Linear):
    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(4, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.add_(1) + super().forward(input)


def test_a_block_whose_layers_have_hooks_runs_eagerly() -> None:
    run = Run()
    seen: list[int] = []
    run.toy.blocks[0].linear.register_forward_hook(lambda *_: seen.append(1))
    for seed in range(3):
        assert run.is_right(rows(seed))
    assert len(seen) == 3
    assert "its layer linear has hooks" in run.graphs.stats().eager[0]


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_a_block_that_ranks_share_runs_eagerly(part: str) -> None:
    run = Run()
    linear = run.toy.blocks[0].linear
    if part == "layer":
        linear.ranks = Ranks(size=2)
    else:
        linear.processor = SimpleNamespace(_parallel_config=object())
    assert all(run.is_right(rows(seed)) for seed in range(2))
    (why,) = run.graphs.stats().eager
    assert "their collectives are not recorded" in why
    assert run.counts == (1, 1, 2)


def test_hidden_states_are_collected_of_replayed_blocks_and_attention_maps_of_eager_ones() -> None:
    config = CLIPTextConfig(
        vocab_size=99, hidden_size=8, num_attention_heads=2, intermediate_size=16, attn_implementation="eager"
    )
    torch.manual_seed(0)
    encoder = CLIPTextModel(config).eval()
    found = Graphs({"text_encoder": encoder}, TapeRecorder(), None, max_bytes=10**9, record_after=1)
    run = Run()
    run.batcher = Batcher(max_batch=1, max_tokens=10**6, resources=ForwardResources(graphs=found))
    for seed in range(3):
        ids = torch.randint(99, (1, 7), generator=torch.Generator().manual_seed(seed))
        for wanted in ({"output_hidden_states": True}, {"output_attentions": True}):
            (answer,) = run(Call("text_encoder", "__call__", encoder, (ids,), wanted))
            expected = encoder(ids, **wanted)
            for name in expected:
                assert all(map(torch.equal, leaves(answer[name]), leaves(expected[name]))), name
            assert len(answer["hidden_states" if "output_hidden_states" in wanted else "attentions"]) > 2
    assert found.stats().replays
    assert "what its layers compute is collected by hooks" in found.stats().eager[0]


def leaves(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def test_shapes_make_way_for_others_and_come_back() -> None:
    alone = Run()
    alone.is_right(rows(0, 3))
    run = Run(max_bytes=alone.recorder.nbytes * 2)
    for seed in range(40):
        assert run.is_right(rows(seed, 1 + seed % 3))
    stats = run.graphs.stats()
    assert stats.evictions
    assert stats.shapes < 3
    assert stats.replays > stats.captures, "shapes that do not fit together do not replace each other all the time"


def test_a_shape_that_is_too_large_alone_runs_eagerly() -> None:
    run = Run(max_bytes=100)
    assert all(run.is_right(rows(seed)) for seed in range(5))
    assert run.counts == (1, 0, 10), "it is tried once, and makes no others go again"
    assert run.graphs.stats().shapes == 0
    assert "need more memory than there is" in run.graphs.stats().eager[0]


def test_a_forward_without_memory_drops_graphs_and_goes_on() -> None:
    run = Run()
    run.is_right(rows(0))
    failing = [True]

    def out_of_memory(module: nn.Module, args: Any) -> None:
        if failing.pop():
            failing.append(False)
            raise torch.OutOfMemoryError("CUDA out of memory")
        failing.append(False)

    run.toy.register_forward_pre_hook(out_of_memory)
    assert run.is_right(rows(1))
    assert run.graphs.stats().shapes == 0
    assert all(run.is_right(rows(seed)) for seed in range(4))
    assert run.graphs.stats().shapes == 1, "they are recorded again later"


def test_a_device_without_memory_for_graphs_serves_eagerly() -> None:
    run = Run()
    run.recorder.is_full = True
    assert all(run.is_right(rows(seed)) for seed in range(3))
    run.recorder.is_full = False
    assert all(run.is_right(rows(seed)) for seed in range(8))
    assert run.counts[0] == 2


def test_an_enforced_miss_says_how_the_call_differs() -> None:
    run = Run()
    with run.graphs.recording():
        assert run.is_right(rows(0))
    run.graphs.enforce()
    assert run.is_right(rows(1))
    with pytest.raises(
        GraphMiss, match=r"blocks\.0 of transformer .*: x is float32 \[1, 2, 4\] and not float32 \[1, 3, 4\]"
    ):
        run(run.call(rows(1)[:, :2].contiguous()))
    with pytest.raises(GraphMiss, match="has 1 positional arguments and scale"):
        run(run.call(rows(1), scale=2.0))
    run.graphs.forget()
    assert run.is_right(rows(2)), "what was captured is captured again after sleep"


def test_rows_for_which_there_is_no_graph_run_in_halves_while_graphs_are_enforced() -> None:
    run = Run()
    with run.graphs.recording():
        run(run.call(rows(0)))
        run(*[run.call(rows(seed)) for seed in range(2)])
    run.graphs.enforce()
    answers = run(*[run.call(rows(seed)) for seed in range(4)])
    pairs = [run.plain(torch.cat([rows(seed), rows(seed + 1)])) for seed in (0, 2)]
    assert torch.equal(torch.cat(answers), torch.cat(pairs))
    assert len(run(*[run.call(rows(seed)) for seed in range(3)])) == 3
    assert run.graphs.stats().shapes == 2


def test_calls_with_other_settings_of_torch_run_the_plain_block_and_are_misses() -> None:
    run = Run()
    run.is_right(rows(0))
    captures, replays, misses = run.counts
    with torch.autocast("cpu", torch.bfloat16):
        expected = run.plain(rows(0))

    def body(call: Call) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return cross(call)

    assert torch.equal(run(run.call(rows(0)), body=body)[0], expected)
    assert run.counts == (captures, replays, misses + 2)
    (why,) = run.graphs.stats().eager
    assert why == "transformer, 2 blocks: its pipeline calls it with other settings of torch"


def test_calls_that_change_the_component_are_misses_which_enforcement_refuses() -> None:
    run = Run()
    with run.graphs.recording():
        run(run.call(rows(0)))
    run.graphs.enforce()
    with pytest.raises(
        GraphMiss, match=r"blocks\.0 of transformer .*: its pipeline changes the component for the call"
    ):
        run(replace(run.call(rows(0)), around=nullcontext))
    assert run.counts[2] == 1


def test_an_enforced_start_says_that_requests_run_one_after_the_other() -> None:
    run = Run()
    with run.graphs.recording():
        run(run.call(rows(0)), exclusive=True)
    with pytest.raises(StartFailed, match="transformer, 2 blocks: requests of its pipeline run one after the other"):
        run.graphs.enforce()


def test_a_module_that_is_two_components_has_its_graphs_once() -> None:
    toy = Toy().eval()
    found = Graphs({"transformer": toy, "transformer_2": toy}, TapeRecorder(), None, max_bytes=10**9, record_after=1)
    batcher = Batcher(max_batch=1, max_tokens=10**6, resources=ForwardResources(graphs=found))
    for name in ("transformer", "transformer_2"):
        run = Run()
        run.batcher = batcher
        assert torch.equal(run(Call(name, "__call__", toy, (rows(1),), {}))[0], run.plain(rows(1)))
    assert found.stats().captures == 2
