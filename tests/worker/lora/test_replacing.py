"""Adapters that are replaced, moved to other components, or named for the wrong component."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import nn

from safelight.protocol.adapters import ALL, MergeAdapters, SetAdapters, UnloadAdapter, Use
from safelight.protocol.config import Config
from safelight.protocol.errors import Conflict, InvalidRequest
from safelight.tests.tiny import save
from safelight.worker.lora.layers import AdaptedLayer
from safelight.worker.model.model import Model, load_model

from .agreement import Made, change, distance, draw, new_adapters, new_batcher, request, source, write_adapter

SMALL = Made("small", 2, 2.0, seed=1)
OTHER = Made("other", 2, 2.0, seed=2)


def for_components(folder: Path, nickname: str, made: dict[str, tuple[Made, nn.Module]]) -> Path:
    """An adapter of several components, under diffusers' names."""
    tensors = {}
    for component, (one, module) in made.items():
        written = write_adapter(one, module, folder / f"{nickname}-{component}")
        for name, tensor in load_file(written / "adapter_model.safetensors").items():
            tensors[name.replace("base_model.model.", f"{component}.")] = tensor
    target = folder / nickname
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def setting(folder: Path, nickname: str = "x", mode: str = "merge", target: str = ALL) -> SetAdapters:
    given = replace(source(folder, nickname), target=target)
    return SetAdapters(nicknames=[nickname], strengths=[1.0], mode=mode, target=target, sources=[given])  # type: ignore[arg-type]  # one of its words


@pytest.fixture
def flux(tiny_model: Callable[[str], Model]) -> Model:
    return tiny_model("flux")


def test_an_adapter_is_no_longer_active_where_its_new_file_has_nothing(flux: Model, tmp_path: Path) -> None:
    parts = {name: (SMALL, flux.pipeline.components[name]) for name in ("transformer", "text_encoder_2")}
    both = for_components(tmp_path, "both", parts)
    one = for_components(tmp_path, "one", {"transformer": parts["transformer"]})
    adapters = new_adapters(flux)
    change(adapters, setting(both))
    assert sorted(adapters.state.active) == ["text_encoder_2", "transformer"]
    change(adapters, setting(one, target="transformer"))
    assert list(adapters.state.active) == ["transformer"]
    assert "no longer active in text_encoder_2" in adapters.notes[0]
    assert not flux.layouts["text_encoder_2"].bases
    with pytest.raises(Conflict, match="active for all requests"):
        adapters.prepare(setting(both, mode="request"))


def test_the_same_merged_words_of_another_file_are_encoded_anew(flux: Model, tmp_path: Path) -> None:
    encoder = flux.pipeline.text_encoder_2
    first, second = (
        for_components(tmp_path, one.nickname, {"text_encoder_2": (one, encoder)}) for one in (SMALL, OTHER)
    )
    adapters = new_adapters(flux)
    change(adapters, setting(first))
    before = adapters.state.active
    adapters.prepare(setting(second))
    adapters.write()
    assert adapters.written
    assert adapters.commit() == {"text_encoder_2"}, "what is drawn is another"
    assert not adapters.written
    assert adapters.state.active == before
    adapters.prepare(setting(second, mode="merge"))
    adapters.write()
    assert not adapters.commit(), "nothing is another"


def test_each_denoiser_has_its_own_factors(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    model = tiny_model("wan22")
    parts = {"transformer": (SMALL, model.pipeline.transformer), "transformer_2": (OTHER, model.pipeline.transformer_2)}
    adapters = new_adapters(model)
    change(adapters, setting(for_components(tmp_path, "both", parts)))
    factors = [next(iter(adapters._adapters["x"].factors[name].values())).down for name in parts]
    assert not torch.equal(*factors)
    one = write_adapter(SMALL, model.pipeline.transformer, tmp_path)
    change(adapters, UnloadAdapter("x"))
    change(adapters, setting(one))
    assert list(adapters.state.active) == ["transformer"], "what does not name the other is not for it"
    change(adapters, setting(one, "y", target="transformer_2"))
    assert {name: [each.nickname for each in ones] for name, ones in adapters.state.active.items()} == {
        "transformer": ["x"],
        "transformer_2": ["y"],
    }
    assert list(adapters._adapters["y"].factors) == ["transformer_2"]


def test_each_of_two_adapters_is_for_its_own_target(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    model = tiny_model("wan22")
    given = [write_adapter(one, model.pipeline.transformer, tmp_path) for one in (SMALL, OTHER)]
    targets = ["transformer", "transformer_2"]
    sources = [replace(source(one), target=target) for one, target in zip(given, targets, strict=True)]
    adapters = new_adapters(model)
    change(
        adapters,
        SetAdapters(nicknames=["small", "other"], strengths=[1.0, 1.0], targets=targets, mode="merge", sources=sources),
    )
    assert {name: [one.nickname for one in ones] for name, ones in adapters.state.active.items()} == {
        "transformer": ["small"],
        "transformer_2": ["other"],
    }


def test_what_is_merged_cannot_be_named_by_a_request(flux: Model, tmp_path: Path) -> None:
    adapters = new_adapters(flux)
    change(adapters, setting(write_adapter(SMALL, flux.pipeline.transformer, tmp_path)))
    with pytest.raises(Conflict, match="x is merged into the weights"):
        adapters.wanted([Use("x")])
    change(adapters, SetAdapters(nicknames=["x"], strengths=[1.0], mode="dynamic"))
    assert adapters.wanted([Use("x")])


class _NotAlwaysCalled(nn.Linear):
    pass


def test_layers_that_can_only_be_merged_are_not_left_out_in_silence(flux: Model, tmp_path: Path) -> None:
    folder = write_adapter(SMALL, flux.pipeline.transformer, tmp_path)
    flux.pipeline.transformer.proj_out.__class__ = _NotAlwaysCalled
    adapters = new_adapters(flux)
    for mode in ("dynamic", "request"):
        with pytest.raises(InvalidRequest, match=r"transformer\.proj_out can only be merged into"):
            adapters.prepare(setting(folder, mode=mode))
    change(adapters, setting(folder, mode="auto"))
    assert adapters.state.active["transformer"][0].merged
    assert "can only be merged into" in adapters.notes[0]


def test_a_sent_adapter_leaves_others_active(flux: Model, tmp_path: Path) -> None:
    first, second = (write_adapter(one, flux.pipeline.transformer, tmp_path) for one in (SMALL, OTHER))
    adapters = new_adapters(flux)
    change(adapters, setting(first))
    change(adapters, replace(setting(second, "y"), keeps=True))
    assert [one.nickname for one in adapters.state.active["transformer"]] == ["x", "y"]
    change(adapters, replace(setting(first, "y"), keeps=True))
    assert [one.nickname for one in adapters.state.active["transformer"]] == ["x", "y"]


def test_what_waiting_requests_name_is_not_evicted(flux: Model, tmp_path: Path) -> None:
    folders = [write_adapter(Made(name, 2, 2.0), flux.pipeline.transformer, tmp_path) for name in ("a", "b", "c")]
    adapters = new_adapters(flux, most=2)
    for folder in folders[:2]:
        change(adapters, setting(folder, folder.name, mode="request"))
    wanted = replace(setting(folders[2], "c", mode="request"), recent=["a", "b"], busy=["a"])
    change(adapters, wanted)
    assert list(adapters.state.loaded) == ["a", "c"]


def test_unrelated_changes_merge_nothing_anew(flux: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safelight.worker.lora import rank_adapters as module

    first, second = (write_adapter(one, flux.pipeline.transformer, tmp_path) for one in (SMALL, OTHER))
    adapters = new_adapters(flux)
    change(adapters, setting(first))
    merges: list[object] = []
    monkeypatch.setattr(module, "merge", lambda *arguments: merges.append(arguments))
    change(adapters, setting(second, "y", mode="request"))
    change(adapters, UnloadAdapter("y"))
    assert merges == []
    change(adapters, MergeAdapters(ALL, [0.5]))
    assert len(merges) == 1


def test_a_fused_text_encoder_takes_adapters_under_its_own_names(tmp_path: Path) -> None:
    checkpoint = save("qwenimage", tmp_path)
    plain = load_model(Config(model=str(checkpoint), device="cpu"))
    made = Made("words", 4, 4.0, ("self_attn.q_proj", "mlp.up_proj"), seed=1)
    folder = for_components(tmp_path, "words", {"text_encoder": (made, plain.pipeline.text_encoder)})
    pictures = []
    for fused in (False, True):
        model = load_model(Config(model=str(checkpoint), device="cpu", fuse_projections=fused))
        adapters = new_adapters(model)
        batcher = new_batcher(adapters)
        pictures.append(draw(model, batcher, adapters, [request("qwenimage", 0)])[0])
        for mode in ("merge", "dynamic"):
            change(adapters, setting(folder, "words", mode=mode))
            pictures.append(draw(model, batcher, adapters, [request("qwenimage", 0)])[0])
    for index in range(3):
        assert distance(pictures[3 + index], pictures[index]) < 1e-5
    assert distance(pictures[1], pictures[2]) < 1e-5
    assert distance(pictures[1], pictures[0]) > 1e-4


def test_what_is_merged_while_a_request_is_drawn_is_not_added_to_it_twice(flux: Model, tmp_path: Path) -> None:
    folder = write_adapter(SMALL, flux.pipeline.transformer, tmp_path / "x")
    adapters = new_adapters(flux)
    change(adapters, setting(folder, mode="request"))
    wanted = adapters.wanted([Use("x")])
    assert len(adapters.uses("transformer", wanted)) == 1
    change(adapters, SetAdapters(nicknames=["x"], strengths=[1.0], mode="merge"))
    assert adapters.uses("transformer", wanted) == ()
    change(adapters, MergeAdapters(ALL, [0.5]))
    assert adapters.uses("transformer", wanted) == ()
    change(adapters, UnloadAdapter("x"))
    assert len(adapters.uses("transformer", wanted)) == 1


def test_a_request_keeps_the_components_of_its_adapter(flux: Model, tmp_path: Path) -> None:
    parts = {name: (SMALL, flux.pipeline.components[name]) for name in ("transformer", "text_encoder_2")}
    both = for_components(tmp_path, "both", parts)
    adapters = new_adapters(flux)
    change(adapters, setting(both, mode="request"))
    wanted = adapters.wanted([Use("x")])
    assert [len(adapters.uses(name, wanted)) for name in parts] == [1, 1]
    change(adapters, setting(both, mode="request", target="text_encoder_2"))
    assert [len(adapters.uses(name, wanted)) for name in parts] == [1, 1]
    assert [len(adapters.uses(name, adapters.wanted([Use("x")]))) for name in parts] == [0, 1]


def test_a_large_adapter_that_is_not_used_makes_no_other_larger(flux: Model, tmp_path: Path) -> None:
    made = [Made(f"small-{number}", 2, 2.0, seed=number) for number in range(3)] + [Made("large", 64, 2.0, seed=9)]
    adapters = new_adapters(flux)
    for one in made:
        change(
            adapters,
            setting(write_adapter(one, flux.pipeline.transformer, tmp_path / one.nickname), one.nickname, "request"),
        )

    def bytes_for(*names: str) -> int:
        rows = [(1, adapters.uses("transformer", adapters.wanted([Use(name)]))) for name in names]
        with adapters.applied("transformer", rows):
            path = next(iter(rows[0][1][0][0].factors["transformer"]))
            layer = flux.pipeline.transformer.get_submodule(path)
            return sum(layer.lora.gathered[used.kind].entry_nbytes for used in layer.lora.active.now)

    small = bytes_for("small-0", "small-1")
    assert bytes_for("small-0", "large") > 4 * small
    assert bytes_for("small-1", "small-2") == small


def test_the_same_adapters_in_another_order_are_the_same(flux: Model, tmp_path: Path) -> None:
    adapters = new_adapters(flux)
    for one in (SMALL, OTHER):
        change(
            adapters,
            setting(write_adapter(one, flux.pipeline.transformer, tmp_path / one.nickname), one.nickname, "request"),
        )
    found = []
    for names in (("small", "other"), ("other", "small")):
        uses = adapters.uses("transformer", adapters.wanted([Use(name) for name in names]))
        with adapters.applied("transformer", [(2, uses)]):
            layer = next(part for part in flux.pipeline.transformer.modules() if isinstance(part, AdaptedLayer))
            found.append([(used.kind, layer.lora.gathered[used.kind].up.tolist()) for used in layer.lora.active.now])
    assert found[0] == found[1]
