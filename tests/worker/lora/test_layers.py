"""Adapted layers are there while adapters are, and what was compiled or captured of them outlives each adapter."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from safelight.protocol.adapters import SetAdapters, UnloadAdapter, Use
from safelight.protocol.errors import Conflict, InvalidRequest
from safelight.worker.forward.adapters import CannotMix
from safelight.worker.forward.at_rest import AtRest
from safelight.worker.lora.adapter import Adapter, placed
from safelight.worker.lora.bank import ActiveAdapters
from safelight.worker.lora.dynamic import DynamicLora
from safelight.worker.lora.factors import LoraFactors
from safelight.worker.lora.files import AdapterFile, LowRank
from safelight.worker.lora.layers import AdaptedLayer, LayerLora
from safelight.worker.lora.rank_adapters import RankAdapters
from safelight.worker.model.model import Model
from safelight.worker.weights.checkpoint.layout import Layout

from .agreement import CPU, Made, change, distance, draw, new_adapters, new_batcher, request, source, write_adapter

NAMES = ("first", "second", "third")


@pytest.fixture
def flux(tiny_model: Callable[[str], Model]) -> Model:
    return tiny_model("flux")


def adapted(model: Model, component: str = "transformer") -> list[AdaptedLayer]:
    module = model.pipeline.components[component]
    parts = module.modules() if isinstance(module, nn.Module) else ()
    return [part for part in parts if isinstance(part, AdaptedLayer)]


def described(model: Model) -> list[tuple[Any, ...]]:
    """Every layer with its class, its attributes' names, and its hooks."""
    modules = [part for part in model.pipeline.components.values() if isinstance(part, nn.Module)]
    return [
        (layer, type(layer), tuple(vars(layer)), len(layer._forward_hooks), len(layer._forward_pre_hooks))
        for module in modules
        for layer in module.modules()
    ]


def load(adapters: RankAdapters, model: Model, folder: Path, nickname: str, rank: int = 3, seed: int = 0) -> None:
    made = Made(nickname, rank, float(rank), seed=seed or 1 + sum(map(ord, nickname)))
    written = write_adapter(made, model.pipeline.transformer, folder / nickname)
    change(adapters, SetAdapters(nicknames=[nickname], strengths=[1.0], mode="request", sources=[source(written)]))


def unload(adapters: RankAdapters, *nicknames: str) -> None:
    for nickname in nicknames:
        change(adapters, UnloadAdapter(nickname))


def named(adapters: RankAdapters, nickname: str, strength: float = 1.0) -> ActiveAdapters:
    return adapters.uses("transformer", adapters.wanted([Use(nickname, strength)]))


def storages(model: Model) -> list[tuple[int, int]]:
    """The addresses of everything that the layers read of adapters in the running forward."""
    lora = [layer.lora for layer in adapted(model)]
    factors = [one.gathered[rows.kind] for one in lora for rows in one.active.now if rows.kind in one.gathered]
    assert factors
    return [(one.down.data_ptr(), one.up.data_ptr()) for one in factors]


def test_without_adapters_every_module_is_as_its_class_makes_it(flux: Model, tmp_path: Path) -> None:
    plain = draw(flux, new_batcher(None), new_adapters(flux), [request("flux", 0)])[0]
    before = described(flux)
    assert not any(hooks or pre_hooks for *_, hooks, pre_hooks in before)
    adapters = new_adapters(flux)
    assert described(flux) == before
    load(adapters, flux, tmp_path, "first")
    linear = [layer for layer, cls, *_ in before if cls is nn.Linear]
    assert adapted(flux) == [layer for layer in flux.pipeline.transformer.modules() if layer in linear]
    assert not adapted(flux, "text_encoder"), "it is for the transformer alone"
    assert torch.equal(draw(flux, new_batcher(adapters), adapters, [request("flux", 0)])[0], plain)
    load(adapters, flux, tmp_path, "second")
    unload(adapters, "first")
    assert adapted(flux)
    unload(adapters, "second")
    assert described(flux) == before


def test_a_change_of_adapters_replaces_no_module_and_no_memory(flux: Model, tmp_path: Path) -> None:
    adapters = new_adapters(flux)
    load(adapters, flux, tmp_path, "first")
    with adapters.applied("transformer", [(2, named(adapters, "first"))]):
        layers, memory = adapted(flux), storages(flux)
    with adapters.applied("transformer", [(1, named(adapters, "first")), (1, ())]):
        of_each = storages(flux)
    for nickname in ("second", "third", "first"):
        load(adapters, flux, tmp_path, nickname, rank=4, seed=7)
        with adapters.applied("transformer", [(2, named(adapters, nickname, 0.5))]):
            assert (adapted(flux), storages(flux)) == (layers, memory)
    unload(adapters, "first", "second")
    with adapters.applied("transformer", [(1, named(adapters, "third")), (1, ())]):
        assert (adapted(flux), storages(flux)) == (layers, of_each)
    unload(adapters, "third")


def test_adapters_that_a_request_in_inference_mode_used_first_can_be_used_without_it(
    flux: Model, tmp_path: Path
) -> None:
    adapters = new_adapters(flux)
    load(adapters, flux, tmp_path, "first")
    with torch.inference_mode(), adapters.applied("transformer", [(2, named(adapters, "first"))]):
        memory = storages(flux)
    load(adapters, flux, tmp_path, "second")
    with adapters.applied("transformer", [(2, named(adapters, "second"))]):
        assert storages(flux) == memory
    with adapters.applied("transformer", [(1, named(adapters, "first")), (1, named(adapters, "second"))]):
        pass
    unload(adapters, "first", "second")


def test_a_change_of_adapters_compiles_nothing_anew(flux: Model, tmp_path: Path) -> None:
    compiled = 0

    def count(graph: torch.fx.GraphModule, _: Sequence[torch.Tensor]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return graph

    adapters = new_adapters(flux)
    block = flux.pipeline.transformer.transformer_blocks[0].ff  # whose layers the adapters have
    forward = torch.compile(block, backend=count, fullgraph=True)
    wide = block.net[2].out_features
    x = torch.randn(2, 5, wide)

    def both(*rows: tuple[int, ActiveAdapters]) -> torch.Tensor:
        with adapters.applied("transformer", rows):
            expected = block(x)
            torch.testing.assert_close(forward(x), expected)
        return expected

    for nickname in NAMES[:2]:
        load(adapters, flux, tmp_path, nickname)
    plain = both((2, ()))
    first = both((2, named(adapters, "first")))
    mixed = both((1, named(adapters, "first")), (1, ()))
    assert torch.equal(mixed[1], plain[1])
    variants = compiled
    assert 0 < variants <= 3, "no adapters, the same for all rows, and others for each"
    assert distance(both((2, named(adapters, "second"))), first) > 1e-4
    unload(adapters, "first")
    load(adapters, flux, tmp_path, "third")
    both((2, named(adapters, "third", 0.5)))
    both((1, named(adapters, "second", -1.0)), (1, named(adapters, "third")))
    assert torch.equal(both((2, ())), plain)
    assert compiled == variants
    unload(adapters, "second", "third")


def test_what_an_adapter_computes_does_not_depend_on_those_that_were_there_before(flux: Model, tmp_path: Path) -> None:
    adapters = new_adapters(flux)
    load(adapters, flux, tmp_path, "first")

    def drawn() -> torch.Tensor:
        return draw(flux, new_batcher(adapters), adapters, [request("flux", 0, [Use("first")])])[0]

    alone = drawn()
    others = [f"other-{number}" for number in range(17)]
    for number, nickname in enumerate(others):
        load(adapters, flux, tmp_path, nickname, rank=(3, 40)[number == 4])
        with adapters.applied("transformer", [(1, named(adapters, "first")), (1, named(adapters, nickname))]):
            pass
    for nickname in others:
        with adapters.applied("transformer", [(1, named(adapters, nickname))]):
            pass
    assert torch.equal(drawn(), alone)
    unload(adapters, "first", *others)


def test_a_request_outlives_the_last_adapter_and_leaves_the_layers_as_they_were(flux: Model, tmp_path: Path) -> None:
    adapters = new_adapters(flux)
    load(adapters, flux, tmp_path, "first")
    kept = named(adapters, "first")
    block = flux.pipeline.transformer.transformer_blocks[0].ff
    x = torch.randn(2, 5, block.net[2].out_features)
    plain = block(x)
    with adapters.applied("transformer", [(2, kept)]):
        wanted = block(x)
    unload(adapters, "first")
    for _ in range(2):
        with adapters.applied("transformer", [(2, kept)]):
            assert torch.equal(block(x), wanted)
        assert not adapted(flux)
        assert torch.equal(block(x), plain)


def test_a_forward_within_another_leaves_the_outer_one_its_adapters(flux: Model, tmp_path: Path) -> None:
    adapters = new_adapters(flux)
    for nickname in NAMES[:2]:
        load(adapters, flux, tmp_path, nickname)
    block = flux.pipeline.transformer.transformer_blocks[0].ff
    x = torch.randn(2, 5, block.net[2].out_features)
    with adapters.applied("transformer", [(1, named(adapters, "first")), (1, named(adapters, "second"))]):
        wanted = block(x)
        with adapters.applied("transformer", [(1, named(adapters, "second"))]):
            block(x[:1])
        assert torch.equal(block(x), wanted)
    unload(adapters, *NAMES[:2])


def test_a_forward_that_fails_leaves_the_layers_their_adapters(flux: Model, tmp_path: Path) -> None:
    at_rest = AtRest({"transformer": flux.pipeline.transformer})
    adapters = new_adapters(flux)
    load(adapters, flux, tmp_path, "first")
    at_rest.restore("transformer")
    assert all(isinstance(layer.lora, LayerLora) for layer in adapted(flux))
    with adapters.applied("transformer", [(2, named(adapters, "first"))]):
        adapted(flux)[0](torch.randn(2, adapted(flux)[0].in_features))
    unload(adapters, "first")


def test_code_that_asks_for_a_layer_s_class_hears_of_its_own(flux: Model, tmp_path: Path) -> None:
    from safelight.worker.crossing.exact_type import TypeThroughBoundaries
    from safelight.worker.crossing.fork import Fork

    adapters = new_adapters(flux)
    load(adapters, flux, tmp_path, "first")
    with Fork(flux.pipeline) as pipeline:
        layer = pipeline.transformer.x_embedder
        assert TypeThroughBoundaries(layer) is nn.Linear
        assert isinstance(layer, nn.Linear)
        assert type(flux.pipeline.transformer.x_embedder) is not nn.Linear
    unload(adapters, "first")


def gathered_bytes(model: Model) -> int:
    """Counted by storage, whatever the adapters' own count says."""
    factors = [one for layer in adapted(model) for one in layer.lora.gathered.values()]
    found = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for one in factors
        for part in (one.down, one.up)
    }
    return sum(found.values())


def test_the_first_adapter_takes_the_memory_of_one(flux: Model, tmp_path: Path) -> None:
    adapters = new_adapters(flux)
    load(adapters, flux, tmp_path, "first", rank=8)
    load(adapters, flux, tmp_path, "second", rank=8)
    ((adapter, _),) = first = named(adapters, "first")
    one = sum(factors.down.nbytes + factors.up.nbytes for factors in adapter.factors["transformer"].values())
    with adapters.applied("transformer", [(2, first)]):
        assert gathered_bytes(flux) == one
    with adapters.applied("transformer", [(3, first + named(adapters, "second"))]):
        assert gathered_bytes(flux) == 2 * one
    with adapters.applied("transformer", [(1, first), (2, ())]):
        assert gathered_bytes(flux) == 2 * one + 3 * one
    unload(adapters, "second")
    assert gathered_bytes(flux) == 3 * one, "no loaded adapters can need room for two"
    unload(adapters, "first")


def test_gathered_factors_count_in_the_limit_of_adapters(flux: Model, tmp_path: Path) -> None:
    adapters = new_adapters(flux)
    load(adapters, flux, tmp_path, "first", rank=8)
    one = adapters.state.loaded["first"].nbytes
    unload(adapters, "first")
    adapters = new_adapters(flux, most_bytes=4 * one - 1)
    load(adapters, flux, tmp_path, "first", rank=8)
    first = named(adapters, "first")
    mixed = adapters.applied("transformer", [(1, first), (1, ())])
    with pytest.raises(CannotMix, match="the factors of their rows need"), mixed:
        pass
    with adapters.applied("transformer", [(2, first)]):
        assert gathered_bytes(flux) == one
    written = write_adapter(Made("second", 8, 8.0, seed=2), flux.pipeline.transformer, tmp_path / "second")
    second = SetAdapters(
        nicknames=["second"], strengths=[1.0], mode="request", sources=[source(written)], busy=["first"]
    )
    sizes = f"of {(4 * one - 1) / 1e6:.1f} MB in all may be loaded, and these would be 2 of {4 * one / 1e6:.1f} MB"
    with pytest.raises(Conflict, match=sizes):
        adapters.prepare(second)
    unload(adapters, "first")


def test_factors_of_an_unloaded_adapter_are_freed_after_the_forward_that_uses_it(flux: Model, tmp_path: Path) -> None:
    adapters = new_adapters(flux)
    load(adapters, flux, tmp_path, "first", rank=8)
    load(adapters, flux, tmp_path, "large", rank=64)
    running = named(adapters, "large")
    with adapters.applied("transformer", [(2, named(adapters, "first"))]):
        pass
    before = gathered_bytes(flux)
    with adapters.applied("transformer", [(1, running), (1, ())]):
        assert gathered_bytes(flux) > 2 * before
    factors = weakref.ref(next(running[0][0].tensors()))
    unload(adapters, "large")
    assert gathered_bytes(flux) == before
    with adapters.applied("transformer", [(1, running), (1, ())]):
        assert gathered_bytes(flux) > 2 * before
    assert gathered_bytes(flux) == before
    del running
    assert factors() is None, "the adapter's own factors live as long as requests that name it"
    unload(adapters, "first")


def test_adapters_that_name_one_layer_by_two_paths_add_up() -> None:
    layer = nn.Linear(6, 5)
    component = nn.Sequential(layer, layer)
    factors = [LoraFactors("0.weight", torch.randn(2, 6), up, up) for up in torch.randn(2, 5, 2)]
    first, second = (Adapter("a", {"transformer": {str(number): one}}) for number, one in enumerate(factors))
    dynamic = DynamicLora("transformer", component)
    dynamic.retain([first, second])
    x = torch.randn(2, 6)
    plain, one, other = layer(x), *(x @ one.down.T @ one.up.T for one in factors)
    with dynamic.applied([(2, ((first, 0.5), (second, -2.0)))]):
        torch.testing.assert_close(layer(x), plain + 0.5 * one - 2 * other)
    with dynamic.applied([(1, ((first, 1.0),)), (1, ((second, 1.0),))]):
        torch.testing.assert_close(layer(x), plain + torch.stack([one[0], other[1]]))


def test_an_adapter_with_two_names_of_one_layer_is_refused_with_both() -> None:
    layer = nn.Linear(6, 5)
    component = nn.Sequential(layer, layer)
    pair = LowRank(torch.randn(2, 6), torch.randn(5, 2), 2.0, 1.0)
    for paths in ("01", "0", "1"):
        file = AdapterFile({"transformer": dict.fromkeys(paths, pair)}, rank=2, alpha=2.0)
        with pytest.raises(InvalidRequest, match=r"transformer\.[01] shares its weight with transformer\.[01],"):
            placed(file, "a", "all", {"transformer": component}, {"transformer": Layout.whole(component)}, CPU)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_in_bfloat16_factors_are_those_that_diffusers_loads(flux: Model, low_cpu_mem_usage: bool) -> None:
    theirs = FluxTransformer2DModel.from_config(flux.pipeline.transformer.config).to(torch.bfloat16)
    path = "transformer_blocks.0.attn.to_q"
    ours = copy.deepcopy(theirs.get_submodule(path))
    down, up = torch.randn(4, ours.in_features), torch.randn(ours.out_features, 4)
    factors = {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    theirs.load_lora_adapter(factors, prefix=None, adapter_name="a", low_cpu_mem_usage=low_cpu_mem_usage)
    layer, dynamic = theirs.get_submodule(path), DynamicLora("transformer", nn.Sequential(ours))
    adapter = Adapter("a", {"transformer": {"0": LoraFactors("0.weight", down, up, up)}})
    x = torch.randn(2, 7, ours.in_features).bfloat16()
    with dynamic.applied([(2, ((adapter, 1.0),))]):
        (gathered,) = ours.lora.gathered.values()
        assert torch.equal(gathered.down, layer.lora_A["a"].weight)
        assert torch.equal(gathered.up, layer.lora_B["a"].weight.T)
        drawn = ours(x)
    x, weight, bias, down, up = (one.double() for one in (x, ours.weight, ours.bias, down.bfloat16(), up.bfloat16()))
    exact = x @ weight.T + bias + x @ down.T @ up.T
    assert distance(drawn, exact) <= distance(layer(x.bfloat16()), exact)


def test_rows_that_cannot_mix_leave_those_of_before_what_they_read() -> None:
    component = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    down, up = torch.randn(4, 6), torch.randn(6, 4)
    small, other = (Adapter("a", {"transformer": {path: LoraFactors(path, down, up, up)}}) for path in "01")
    dynamic = DynamicLora("transformer", component)
    dynamic.retain([small, other])
    x = torch.randn(2, 6)
    rows = [(1, ((small, 1.0),)), (1, ())]
    with dynamic.applied(rows, max_bytes=500):
        expected = component(x)
    with pytest.raises(CannotMix, match="need 0"), dynamic.applied([(1, ((other, 1.0),)), (1, ())], max_bytes=500):
        pass
    with dynamic.applied(rows):
        assert torch.equal(component(x), expected)
