"""An adapter that arrives in parts is one adapter, replaced layer by layer, and what peft draws with it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from safelight.protocol.adapters import AdapterSource, RestoreAdapters, SetAdapters, UnmergeAdapters
from safelight.protocol.errors import InvalidRequest
from safelight.protocol.operations import Save
from safelight.protocol.reports import Report
from safelight.protocol.tensor_sources import Files
from safelight.worker.lora.parts import read_parts
from safelight.worker.lora.rank_adapters import RankAdapters
from safelight.worker.model.model import Model
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.weights.checkpoint.layout import Layout
from safelight.worker.weights.snapshot.digests import module_digests

from .agreement import change, new_adapters

NICKNAME = "lora_merge:transformer"
RANK, ALPHA = 4, 6.0
Tensors = Mapping[str, torch.Tensor]


@pytest.fixture
def flux(tiny_model: Callable[[str], Model]) -> Model:
    return tiny_model("flux")


@pytest.fixture
def adapters(flux: Model) -> RankAdapters:
    return new_adapters(flux)


class Trainer:
    """Sends parts as the server has them kept and merged."""

    def __init__(self, adapters: RankAdapters, folder: Path) -> None:
        self._adapters = adapters
        self._folder = folder
        self._numbers = count(1)
        self.begun: list[AdapterSource] = []

    def keep(self, tensors: Tensors, **options: Any) -> tuple[AdapterSource, Report]:
        folder = self._folder / f"part {next(self._numbers)}"
        adapter = AdapterSource(NICKNAME, None, str(folder), str(folder), target="transformer")
        onto = self.begun[-1].folder if self.begun and "update_id" in options else None
        save = Save(source=Files({}), adapter=adapter, onto=onto, **options)
        return adapter, self._adapters.keep(save, tensors)

    def send(self, tensors: Tensors, **options: Any) -> Report:
        adapter, report = self.keep(tensors, **options)
        self._merge(adapter)
        return report

    def part(self, tensors: Tensors, **options: Any) -> Report:
        adapter, report = self.keep(tensors, update_id="u", **options)
        self.begun.append(adapter)
        return report

    def commit(self) -> None:
        self._merge(self.begun[-1])

    def _merge(self, adapter: AdapterSource) -> None:
        wanted = SetAdapters(
            nicknames=[NICKNAME], strengths=[1.0], target="transformer", mode="merge", sources=[adapter], keeps=True
        )
        change(self._adapters, wanted)


@pytest.fixture
def trainer(adapters: RankAdapters, tmp_path: Path) -> Trainer:
    return Trainer(adapters, tmp_path)


def of_peft(model: Model, seed: int, layers: str = r".*attn\.to_[qkv]") -> tuple[Tensors, dict[str, torch.Tensor]]:
    """A trainer's adapter under peft's names, and what peft adds to each weight with it."""
    from safelight.tests.tiny import FAMILIES

    transformer = FAMILIES["flux"].build().transformer
    transformer.load_state_dict(model.pipeline.transformer.state_dict())
    torch.manual_seed(seed)
    transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, init_lora_weights=False)  # type: ignore[arg-type]
    )
    tensors = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(transformer).items()}
    added = {
        f"{path}.weight": layer.get_delta_weight("default").detach()
        for path, layer in transformer.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    return tensors, added


def is_merged(model: Model, base: Tensors, added: Tensors) -> bool:
    live = model.pipeline.transformer.state_dict()
    expected = {name: base[name] + added[name] if name in added else base[name] for name in base}
    return all(torch.allclose(live[name], expected[name], rtol=0, atol=1e-6) for name in base)


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.pipeline.transformer.state_dict().items()}


def buckets(tensors: Tensors, size: int) -> list[dict[str, torch.Tensor]]:
    named = list(tensors.items())
    return [dict(named[start : start + size]) for start in range(0, len(named), size)]


@pytest.mark.parametrize("size", [2, 3, 7], ids="in buckets of {}".format)
@pytest.mark.parametrize("suffix", [".weight", ""])
def test_no_bucket_of_a_version_replaces_the_layers_of_the_one_before(
    flux: Model, trainer: Trainer, size: int, suffix: str
) -> None:
    """Odd sizes cut pairs in two, as buckets do that are filled up to a number of bytes."""
    base = weights(flux)
    tensors, added = of_peft(flux, seed=1)
    sent = {name.removesuffix(".weight") + suffix: tensor for name, tensor in tensors.items()}
    for bucket in buckets(sent, size):
        report = trainer.send(bucket, version="step-1", alpha=ALPHA, rank=RANK)
    assert not report.waiting
    assert is_merged(flux, base, added)


def test_layers_of_before_stay_until_a_version_is_complete(flux: Model, trainer: Trainer) -> None:
    base = weights(flux)
    first, added = of_peft(flux, seed=1)
    trainer.send(first, version="step-1", alpha=ALPHA)
    second, added_later = of_peft(flux, seed=2, layers=r".*attn\.to_q")
    front, back = buckets(second, len(second) // 2)
    trainer.send(front, version="step-2", alpha=ALPHA)
    named = {f"{name.rpartition('.lora_')[0]}.weight" for name in front}
    assert is_merged(flux, base, {**added, **{name: added_later[name] for name in named}})
    trainer.send(back, version="step-2", alpha=ALPHA)
    assert is_merged(flux, base, {**added, **added_later})
    trainer.send({}, version="step-2", complete=True)
    assert is_merged(flux, base, added_later)


def test_each_part_has_its_own_alpha(flux: Model, trainer: Trainer) -> None:
    base = weights(flux)
    tensors, added = of_peft(flux, seed=1)
    front, back = buckets(tensors, len(tensors) // 2)
    trainer.send(front, version="step-1", alpha=ALPHA)
    trainer.send(back, version="step-1", alpha=2 * ALPHA)
    doubled = {f"{name.rpartition('.lora_')[0]}.weight" for name in back}
    assert is_merged(flux, base, {name: one * (2 if name in doubled else 1) for name, one in added.items()})


def test_half_a_pair_changes_nothing_until_its_counterpart_comes(flux: Model, trainer: Trainer) -> None:
    base = weights(flux)
    first, added = of_peft(flux, seed=1)
    trainer.send(first, version="step-1", alpha=ALPHA)
    second, added_later = of_peft(flux, seed=2)
    downs = {name: tensor for name, tensor in second.items() if "lora_A" in name}
    report = trainer.send(downs, version="step-2", alpha=ALPHA / 2)
    assert report.waiting == sorted(downs)
    assert is_merged(flux, base, added)
    trainer.send({name: tensor for name, tensor in second.items() if "lora_B" in name}, version="step-2")
    assert is_merged(flux, base, {name: one / 2 for name, one in added_later.items()})


def test_waiting_factors_are_reported_when_another_version_arrives_instead(flux: Model, trainer: Trainer) -> None:
    base = weights(flux)
    tensors, added = of_peft(flux, seed=1)
    trainer.send(tensors, version="step-1", alpha=ALPHA)
    down = next(name for name in tensors if "lora_A" in name)
    trainer.send({down: tensors[down] * 5}, version="step-2", alpha=ALPHA)
    report = trainer.send(tensors, version="step-3", alpha=ALPHA)
    assert down in report.notes[0]
    assert is_merged(flux, base, added)


@pytest.mark.parametrize("options", [{}, {"version": "step-1", "complete": True}])
def test_half_a_pair_is_refused_where_nothing_can_follow(
    options: dict[str, Any], flux: Model, trainer: Trainer
) -> None:
    base = weights(flux)
    tensors, _ = of_peft(flux, seed=1)
    down = next(name for name in tensors if "lora_A" in name)
    others = {name: tensor for name, tensor in tensors.items() if name != down}
    with pytest.raises(InvalidRequest, match="1 factors have no counterpart"):
        trainer.send(others, **options)
    assert is_merged(flux, base, {})


def test_the_parts_of_a_begun_update_are_all_of_the_adapter_and_change_nothing_before_its_end(
    flux: Model, adapters: RankAdapters, trainer: Trainer
) -> None:
    base, digest = weights(flux), module_digests(flux.layouts, ALONE, lambda: None)[0][0]
    first, added = of_peft(flux, seed=1)
    trainer.send(first, alpha=ALPHA)
    second, added_later = of_peft(flux, seed=2, layers=r".*attn\.to_q")
    for bucket in buckets(second, 3):
        trainer.part(bucket, alpha=ALPHA, rank=RANK)
        assert is_merged(flux, base, added)
    trainer.commit()
    assert is_merged(flux, base, added_later)
    assert module_digests(flux.layouts, ALONE, lambda: None)[0][0] == digest
    change(adapters, UnmergeAdapters())
    assert all(torch.equal(one, base[name]) for name, one in weights(flux).items())


def test_a_part_that_the_model_has_no_layers_for_is_refused_when_it_comes(flux: Model, trainer: Trainer) -> None:
    tensors, _ = of_peft(flux, seed=1)
    trainer.part(tensors, alpha=ALPHA)
    strange = {"no.such.layer.lora_A": torch.ones(4, 64), "no.such.layer.lora_B": torch.ones(64, 4)}
    with pytest.raises(InvalidRequest, match=r"no\.such\.layer"):
        trainer.part(strange)
    assert "no.such.layer.lora_A" not in read_parts(Path(trainer.begun[-1].folder)).tensors


@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", "diffusion_model.", ""])
def test_a_layer_is_the_same_one_whatever_its_prefix(flux: Model, trainer: Trainer, prefix: str) -> None:
    base = weights(flux)
    first, _ = of_peft(flux, seed=1)
    trainer.send(first, version="step-1", alpha=ALPHA)
    second, added = of_peft(flux, seed=2)
    trainer.send({prefix + name: tensor for name, tensor in second.items()}, version="step-2", alpha=ALPHA)
    assert is_merged(flux, base, added)


def test_a_wrong_rank_is_refused_with_the_layers_rank(flux: Model, trainer: Trainer) -> None:
    tensors, _ = of_peft(flux, seed=1)
    with pytest.raises(InvalidRequest, match="it has rank 4, and not 5"):
        trainer.send(tensors, rank=5)
    with pytest.raises(InvalidRequest, match="it has rank 4, and not 3"):
        trainer.send(tensors, version="step-1", rank=3)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fnuz])
def test_factors_of_a_dtype_that_no_adapter_has_are_refused_by_name(
    flux: Model, trainer: Trainer, dtype: torch.dtype
) -> None:
    tensors, _ = of_peft(flux, 0)
    odd = next(iter(tensors))
    with pytest.raises(InvalidRequest, match=str(dtype)) as refused:
        trainer.send({**tensors, odd: tensors[odd].to(dtype)})
    assert (refused.value.field, odd[:40] in refused.value.message) == ("serialized_named_tensors", True)


def merged_by_peft(model: Model, config: PeftConfig) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """A trainer's adapter under peft's names, and every tensor after peft has merged it."""
    from safelight.tests.tiny import FAMILIES

    transformer = FAMILIES["flux"].build().transformer
    transformer.load_state_dict(model.pipeline.transformer.state_dict())
    torch.manual_seed(3)
    inject_adapter_in_model(config, transformer)
    tensors = {
        f"base_model.model.{name}": tensor.detach().clone()
        for name, tensor in get_peft_model_state_dict(transformer).items()
    }
    for layer in [part for part in transformer.modules() if isinstance(part, BaseTunerLayer)]:
        layer.merge()
    return tensors, {
        name.replace(".base_layer", ""): tensor
        for name, tensor in transformer.state_dict().items()
        if not any(word in name for word in ("lora_", "lokr_"))
    }


@pytest.mark.parametrize("first", ["A", "none"])
def test_a_version_may_begin_with_a_bucket_in_which_no_layer_is_whole(
    flux: Model, trainer: Trainer, first: str
) -> None:
    base = weights(flux)
    tensors, added = of_peft(flux, seed=1)
    front = {name: tensor for name, tensor in tensors.items() if f"lora_{first}" in name}
    report = trainer.send(front, version="step-1", alpha=ALPHA)
    assert report.waiting == sorted(front)
    assert is_merged(flux, base, {})
    rest = {name: tensor for name, tensor in tensors.items() if name not in front}
    trainer.send(rest, version="step-1", alpha=ALPHA, complete=True)
    assert is_merged(flux, base, added)


def test_a_replica_that_starts_again_between_two_parts_knows_what_waits(
    flux: Model, adapters: RankAdapters, trainer: Trainer, tmp_path: Path
) -> None:
    base = weights(flux)
    tensors, added = of_peft(flux, seed=1)
    downs = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
    trainer.send(downs, version="step-1", alpha=ALPHA)
    again = new_adapters(flux)
    change(again, RestoreAdapters(adapters.state))
    (tmp_path / "again").mkdir()
    ups = {name: tensor for name, tensor in tensors.items() if name not in downs}
    Trainer(again, tmp_path / "again").send(ups, version="step-1", complete=True)
    assert is_merged(flux, base, added)


def test_an_adapter_without_layers_is_refused_where_nothing_can_follow(trainer: Trainer) -> None:
    with pytest.raises(InvalidRequest, match="it has no layers"):
        trainer.send({}, version="step-1", complete=True)


@pytest.mark.parametrize("order", ["factors first", "factors last"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=6, target_modules=r".*attn\.to_[qk]", use_dora=True, init_lora_weights=False),
        LoraConfig(r=4, lora_alpha=6, target_modules=r".*ff\.net\.2", lora_bias=True, init_lora_weights=False),
        LoKrConfig(r=2, alpha=6, target_modules=r".*attn\.to_[qk]", init_weights=False),
    ],
    ids=["DoRA", "biases", "LoKr"],
)
def test_every_kind_of_layer_is_whole_again_that_buckets_cut(
    flux: Model, trainer: Trainer, config: PeftConfig, order: str
) -> None:
    tensors, merged = merged_by_peft(flux, config)
    names = sorted(tensors, key=lambda name: name.endswith((".lora_A.weight", ".lora_B.weight", "lokr_w1")))
    for name in reversed(names) if order == "factors first" else names:
        report = trainer.send({name: tensors[name]}, version="step-1", alpha=6.0)
    assert not report.waiting
    live = flux.pipeline.transformer.state_dict()
    assert all(torch.allclose(live[name], merged[name], rtol=0, atol=1e-6) for name in merged)


def test_an_alpha_is_refused_for_layers_whose_rank_nothing_says(flux: Model, trainer: Trainer) -> None:
    tensors, _ = merged_by_peft(flux, LoKrConfig(r=4, alpha=6, target_modules=r".*attn\.to_q", init_weights=False))
    with pytest.raises(InvalidRequest, match="an alpha is given for layers without a rank"):
        trainer.send(tensors, version="step-1", alpha=6.0)


def test_an_alpha_that_comes_after_its_factors_is_theirs(flux: Model, trainer: Trainer) -> None:
    base = weights(flux)
    tensors, added = of_peft(flux, seed=1)
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    trainer.send(tensors, version="step-1")
    trainer.send({f"{layer}.alpha": torch.tensor(ALPHA) for layer in layers}, version="step-1", complete=True)
    assert is_merged(flux, base, added)


def test_ranks_merge_in_one_order_whatever_the_order_in_which_each_was_given_its_tensors(
    flux: Model, adapters: RankAdapters, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of rows that ranks divide are summed by all of them together."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=r".*attn\.to_[qk]", use_dora=True, init_lora_weights=False)
    tensors, _ = merged_by_peft(flux, config)
    trainer.send(tensors, alpha=6.0)
    summed: list[str] = []

    def sum_of_rows(self: Layout, name: str, rows: torch.Tensor) -> torch.Tensor:
        summed.append(name)
        return rows

    monkeypatch.setattr(Layout, "sum_of_rows", sum_of_rows)
    names = list(flux.layouts["transformer"].bases)
    assert len(names) > 1
    for given in (names, names[::-1]):
        adapters.rebuild({"transformer": given})
    assert summed[: len(names)] == summed[len(names) :]
