"""Compiled blocks compute what plain ones do, never make a request wait, and say why where they do not serve.

dynamo's own backend "eager" runs a graph's operators as they are, so its results are the plain block's, to the bit.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from safelight.protocol.compiling import CompiledComponentStats
from safelight.worker.accuracy.judging import judge
from safelight.worker.accuracy.policy import load_policy
from safelight.worker.compiling import program
from safelight.worker.compiling.compiler import Compiler
from safelight.worker.crossing.overlay import overlay_attributes
from safelight.worker.crossing.random_state import has_drawn, kept_random_state, seeded, set_random_state
from safelight.worker.internals import dynamo
from safelight.worker.internals.blocks import repeated_blocks
from safelight.worker.lora.adapter import Adapter
from safelight.worker.lora.dynamic import AdapterRows, DynamicLora
from safelight.worker.lora.factors import LoraFactors

NAME = "transformer"


class Layer(nn.Module):
    """A block with a residual, as small as one can be."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x) + shift[:, None])


class Stack(nn.Module):
    """Blocks of class ``cls``; the last one reads a view into a longer sequence, as FLUX's single blocks do."""

    def __init__(self, cls: type[nn.Module] = Layer, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([cls(), cls(), cls()])
        self.eval().requires_grad_(False).to(dtype)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        x = self.blocks[1](self.blocks[0](x, shift), shift)
        output: torch.Tensor = self.blocks[2](torch.cat([x, x], dim=1)[:, x.shape[1] :], shift)
        return output


def draw(module: nn.Module, rows: int = 1, tokens: int = 16, seed: int = 0) -> torch.Tensor:
    generator, dtype = torch.Generator().manual_seed(seed), next(module.parameters()).dtype
    x, shift = torch.randn(rows, tokens, 8, generator=generator), torch.randn(rows, 8, generator=generator)
    output: torch.Tensor = module(x.to(dtype), shift.to(dtype))
    return output


class Compiling:
    """A compiler of one module, and what it has counted."""

    def __init__(self, module: nn.Module, backend: Any = "eager", judged: Any = None) -> None:
        self.module = module
        self.compiler = Compiler({NAME: module}, judged or partial(judge, load_policy()), backend)

    def draw(self, rows: int = 1, tokens: int = 16, seed: int = 0) -> torch.Tensor:
        """As a request has it drawn; afterwards nothing is left to compile."""
        with self.compiler.active(NAME):
            output = draw(self.module, rows, tokens, seed)
        self.compiler.wait()
        return output

    @property
    def stats(self) -> CompiledComponentStats:
        return self.compiler.stats()[NAME]

    @property
    def graphs(self) -> int:
        return sum(self.stats.graphs.values())

    def eager_calls(self, *sizes: Any, **options: Any) -> int:
        """Calls of blocks that run eagerly in one more forward."""
        before = self.stats.eager_calls
        self.draw(*sizes, **options)
        return self.stats.eager_calls - before


def test_the_first_forward_does_not_wait_and_the_next_one_runs_graphs_with_the_same_bits() -> None:
    running, plain = Compiling(Stack()), Stack()
    with running.compiler.active(NAME):
        first = draw(running.module)
    assert running.stats.eager_calls == 3
    running.compiler.wait()
    assert running.eager_calls() == 0
    assert torch.equal(first, draw(plain))
    assert torch.equal(running.draw(seed=3), draw(plain, seed=3))
    assert (running.stats.state, running.stats.reason) == ("compiled", None)


def test_a_thread_that_has_compiled_ends_as_its_openmp_threads_would_send_the_models_to_sleep() -> None:
    running = Compiling(Stack())
    for size in (16, 25):
        running.draw(tokens=size)
        deadline = time.monotonic() + 60
        while any(thread.name == "compiler" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert running.eager_calls(tokens=25) == 0, "the second size was compiled too"


def test_a_compiler_without_a_thread_leaves_blocks_eager_and_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running, plain = Compiling(Stack()), Stack()

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert torch.equal(running.draw(), draw(plain))
    assert (running.stats.state, "can't start new thread" in str(running.stats.reason)) == ("eager", True)


def test_a_compilers_thread_that_fails_leaves_blocks_eager_and_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise AttributeError("torch has moved it")

    running, plain = Compiling(Stack()), Stack()
    monkeypatch.setattr(dynamo, "restore_nothing", broken)
    assert torch.equal(running.draw(), draw(plain))
    assert (running.stats.state, "torch has moved it" in str(running.stats.reason)) == ("eager", True)


def test_all_blocks_of_a_class_share_one_graph_and_another_one_serves_any_number_of_rows() -> None:
    running, plain = Compiling(Stack()), Stack()
    running.draw(rows=1)
    assert running.stats.graphs == {"Layer": 1}
    running.draw(rows=3)
    graphs = running.graphs
    for rows in (2, 5, 3):
        running.draw(rows=rows)
        assert running.eager_calls(rows=rows) == 0
        assert torch.equal(running.draw(rows=rows, seed=rows), draw(plain, rows, seed=rows))
    assert running.graphs == graphs == 2


def test_a_third_size_of_pictures_needs_no_graph_of_its_own() -> None:
    running, plain = Compiling(Stack()), Stack()
    for tokens in (16, 25):
        running.draw(tokens=tokens)
    graphs = running.graphs
    running.draw(tokens=36)
    assert running.eager_calls(tokens=36) == 0
    assert torch.equal(running.draw(tokens=36), draw(plain, tokens=36))
    assert running.graphs == graphs


def test_a_newer_graph_that_fits_an_admitted_kind_of_call_does_not_take_it_over() -> None:
    """Ranks finish the newer one at different times, and it was judged at other sizes."""
    ran: list[int] = []
    numbers = itertools.count()
    at_judge, released = threading.Event(), threading.Event()

    def backend(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        number = next(numbers)
        return lambda *args: (ran.append(number), graph(*args))[1]

    def judged(*outputs: Any) -> str | None:
        if ran[-1] == 1:
            at_judge.set()
            assert released.wait(60)
        return judge(load_policy(), *outputs)

    def graphs_of_a_forward(tokens: int) -> set[int]:
        ran.clear()
        with running.compiler.active(NAME):
            draw(running.module, tokens=tokens)
        return set(ran)

    running = Compiling(Stack(), backend, judged)
    running.draw(tokens=16)
    graphs_of_a_forward(25)
    assert at_judge.wait(60)
    assert graphs_of_a_forward(16) == {0}, "the newer graph is made, and not admitted"
    released.set()
    running.compiler.wait()
    assert graphs_of_a_forward(25) == {1}
    assert graphs_of_a_forward(16) == {0}, "the newer graph is admitted for other calls"


def test_sixteen_numbers_of_rows_at_three_sizes_of_pictures_need_four_graphs_and_each_kind_is_judged() -> None:
    running = Compiling(Stack())
    sizes = [(rows, tokens) for tokens in (16, 25, 36) for rows in range(1, 17)]
    for rows, tokens in sizes:
        running.draw(rows, tokens)
    assert sum(running.eager_calls(rows, tokens) for rows, tokens in sizes) == 0
    assert running.graphs == 4, "one row and several, at the first size and at any other one"
    assert (running.stats.kinds, running.stats.kinds_over_limit) == (len(sizes), 0)


def test_updates_in_place_and_weights_that_moved_keep_graphs_valid() -> None:
    running, plain = Compiling(Stack()), Stack()
    running.draw()
    graphs = running.graphs
    for module in (running.module, plain):
        for parameter in module.parameters():
            parameter.mul_(1.1)
    assert running.eager_calls() == 0
    assert torch.equal(running.draw(), draw(plain))
    kept = [parameter.data for parameter in running.module.parameters()]
    for parameter in running.module.parameters():
        parameter.data = torch.empty(0)  # asleep
    for parameter, data in zip(running.module.parameters(), kept, strict=True):
        parameter.data = data.clone()
    assert running.eager_calls() == 0
    assert torch.equal(running.draw(), draw(plain))
    assert running.graphs == graphs


def test_an_update_during_a_compilation_reaches_the_next_forward() -> None:
    """The compiler has a copy of the block; it must not keep the copy's weights."""
    running, plain = Compiling(Stack()), Stack()
    with running.compiler.active(NAME):
        draw(running.module)
    for module in (running.module, plain):
        for parameter in module.parameters():
            parameter.mul_(1.1)
    running.compiler.wait()
    assert running.eager_calls() == 0
    assert torch.equal(running.draw(), draw(plain))


def wrong(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
    """A compiler whose graphs return too much."""
    return lambda *args: [value * 1.05 if torch.is_tensor(value) else value for value in graph(*args)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_that_is_too_far_from_the_exact_result_never_serves(dtype: torch.dtype) -> None:
    running, plain = Compiling(Stack(dtype=dtype), wrong), Stack(dtype=dtype)
    for seed in range(3):
        assert torch.equal(running.draw(seed=seed), draw(plain, seed=seed))
    assert running.stats.state == "eager"
    measured = "relative L2" if dtype is torch.float32 else "RMS error"
    assert running.stats.reason is not None
    assert running.stats.reason.startswith(f"Layer: {measured}")


def test_a_graph_as_near_to_fp64_as_the_plain_block_serves_in_low_precision() -> None:
    running = Compiling(Stack(dtype=torch.bfloat16))
    running.draw()
    assert running.eager_calls() == 0


class Breaking(Layer):
    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        print(end="")
        return super().forward(x, shift)


class Writing(Layer):
    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return super().forward(x.add_(1.0), shift)


@pytest.mark.parametrize(("cls", "reason"), [(Breaking, "Breaking does not compile"), (Writing, "writes to its argum")])
def test_a_block_that_cannot_be_compiled_runs_eagerly_and_says_why(cls: type[nn.Module], reason: str) -> None:
    running, plain = Compiling(Stack(cls)), Stack(cls)
    for seed in range(2):
        assert torch.equal(running.draw(seed=seed), draw(plain, seed=seed))
    assert running.stats.state == "eager"
    assert reason in str(running.stats.reason)
    assert running.stats.eager_calls == running.stats.calls == 6


def test_a_text_encoder_without_blocks_is_reported_and_left_alone() -> None:
    """``NAME`` stands for any component; the rank refuses denoisers (``test_options``)."""
    module = nn.Sequential(nn.Linear(2, 2))
    running = Compiling(module)
    assert running.stats.state == "eager"
    assert "Sequential has no repeated blocks" in str(running.stats.reason)
    with running.compiler.active(NAME):
        module(torch.ones(1, 2))


def test_outside_of_a_request_s_forward_blocks_run_as_they_are() -> None:
    running = Compiling(Stack())
    draw(running.module)
    with torch.enable_grad(), running.compiler.active(NAME):
        draw(running.module)
    running.compiler.wait()
    assert (running.stats.state, running.stats.calls, running.graphs) == ("waiting", 0, 0)


def test_a_compiled_model_looks_like_itself() -> None:
    module, plain = Stack(), Stack()
    Compiling(module)
    assert str(module) == str(plain)
    assert list(module.state_dict()) == list(plain.state_dict())
    for group, other in zip(repeated_blocks(module), repeated_blocks(plain), strict=True):
        assert group.cls is other.cls
        assert list(group.modules) == list(other.modules)
        assert all(
            set(vars(block)) - overlay_attributes(block) == set(vars(own))
            for block, own in zip(group.modules.values(), other.modules.values(), strict=True)
        )


def test_the_limit_on_graphs_is_reported_by_name_and_graphs_go_on_serving(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(program, "LIMIT", 1)
    running, plain = Compiling(Stack()), Stack()
    with caplog.at_level(logging.WARNING):
        running.draw()
        running.draw(rows=3)
    assert "Layer of transformer" in caplog.text
    assert "limit; further kinds of calls run eagerly" in caplog.text
    assert torch.equal(running.draw(rows=3), draw(plain, 3))
    assert running.eager_calls(rows=3) == 3
    assert running.eager_calls() == 0
    assert running.stats.kinds_over_limit == 1


# a compilation beside requests


class Held:
    """A compiler that waits to be released in the middle of a compilation."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def compile(self, graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        self.entered.set()
        assert self.released.wait(60)
        return graph.forward

    def enter(self, running: Compiling) -> None:
        """Return in the middle of the compilation that a forward of ``running`` begins."""
        with running.compiler.active(NAME):
            draw(running.module)
        assert self.entered.wait(60)

    def release(self, running: Compiling) -> None:
        self.released.set()
        running.compiler.wait()


def test_the_end_of_a_compilation_sets_back_no_request_s_random_state() -> None:
    """A merged forward during which the state changes is taken for one that draws, and its calls run alone for good."""
    held = Held()
    running = Compiling(Stack(), held.compile)
    with kept_random_state():
        set_random_state(seeded(1))
        held.enter(running)
        set_random_state(seeded(2))
        with kept_random_state() as before:
            held.release(running)
            assert not has_drawn(before)
    assert running.eager_calls() == 0


def test_requests_do_not_see_that_something_is_compiled() -> None:
    """Models of diffusers and transformers ask for it, and compute otherwise where it is so."""
    held = Held()
    running = Compiling(Stack(), held.compile)
    held.enter(running)
    try:
        assert not torch.compiler.is_compiling()
    finally:
        held.release(running)
    assert running.stats.state == "compiled"


def test_graphs_serve_while_the_compiler_traces_another_one() -> None:
    """Tracing sets a flag of the whole process, at which dynamo refuses to run what it has compiled."""
    entered, released = threading.Event(), threading.Event()

    def waits(x: torch.Tensor) -> torch.Tensor:
        entered.set()
        assert released.wait(60)
        return x

    def tracing(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        if running.graphs:
            make_fx(waits)(torch.ones(1))  # as inductor's backend does
        return graph.forward

    running = Compiling(Stack(), tracing)
    running.draw()
    with running.compiler.active(NAME):
        draw(running.module, rows=3)
        assert entered.wait(60)
        before = running.stats.eager_calls
        try:
            assert torch.equal(draw(running.module), draw(Stack()))
        finally:
            released.set()
    running.compiler.wait()
    assert running.stats.eager_calls == before


def test_a_setting_that_a_request_changes_during_a_compilation_stays_and_costs_one_attempt() -> None:
    held = Held()
    running = Compiling(Stack(), held.compile)
    held.enter(running)
    torch.set_default_dtype(torch.float64)
    try:
        held.release(running)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert (running.stats.state, running.stats.reason) == ("waiting", None)
    running.draw()
    assert running.eager_calls() == 0


# adapters


def adapter(seed: int, rank: int = 4) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    made = Adapter(f"adapter-{seed}")
    for path in ("blocks.0.linear", "blocks.1.linear", "blocks.2.linear"):
        down, up = torch.randn(rank, 8, generator=generator), torch.randn(8, rank, generator=generator)
        made.factors.setdefault(NAME, {})[path] = LoraFactors(path, down, up, up)
    return made


def test_the_compiler_s_settings_hold_in_its_thread_alone() -> None:
    def settings() -> bool:
        shape_padding: bool = dynamo.inductor_config.shape_padding
        return shape_padding

    usual, compiling = settings(), list[bool]()
    began, looked = threading.Event(), threading.Event()

    def backend(graph: torch.fx.GraphModule, _: Sequence[torch.Tensor]) -> Callable[..., Any]:
        compiling.append(settings())
        began.set()
        assert looked.wait(60)
        return graph.forward

    running = Compiling(Stack(), backend)
    with running.compiler.active(NAME):
        draw(running.module)
    assert began.wait(60)
    meanwhile = settings()
    looked.set()
    running.compiler.wait()
    assert not compiling[0]
    assert usual
    assert meanwhile


def test_adapters_are_compiled_by_kind_and_a_change_of_adapters_needs_no_graph() -> None:
    running, plain = Compiling(Stack()), Stack()
    ones = [adapter(1), adapter(2), adapter(3)]
    loras = [DynamicLora(NAME, running.module), DynamicLora(NAME, plain)]
    for lora in loras:
        lora.retain(ones)

    def compare(rows: AdapterRows, number: int) -> int:
        """The eager calls of a second forward, which has the plain model's bits, as the first one has."""
        for seed in range(2):
            before = running.stats.eager_calls
            with loras[0].applied(rows):
                output = running.draw(number, seed=seed)
            with loras[1].applied(rows):
                assert torch.equal(output, draw(plain, number, seed=seed))
        return running.stats.eager_calls - before

    first, second, third = (((one, 1.0),) for one in ones)
    for rows in ([(1, ()), (1, ())], [(2, first)], [(1, first), (1, second)]):
        assert compare(rows, 2) == 0
    graphs = running.graphs
    assert compare([(2, third)], 2) == 0
    assert compare([(1, third), (1, first)], 2) == 0
    assert running.graphs == graphs == 3
