"""Ranks that share layers or tokens run graphs from the same forward on, and compute what the whole module does."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from safelight.protocol.config import Config
from safelight.tests.effort import chosen
from safelight.tests.ranks import on_mesh
from safelight.tests.tiny import save
from safelight.tests.worker import splitting
from safelight.tests.worker.compiling import dividing, sharing
from safelight.tests.worker.lora import agreement
from safelight.worker.model.model import load_model

MADE = agreement.Made("wide", 4, 4.0)


def known(name: str, directory: Path) -> sharing.Known:
    """The last call of the denoiser in a picture, and what it returns."""
    checkpoint = save(name, directory)
    model = load_model(Config(model=str(checkpoint), dtype="bfloat16", device="cpu"))
    denoiser = model.pipeline.transformer
    adapter = agreement.write_adapter(MADE, denoiser, directory / f"{name}-adapters")
    kept: dict[str, Any] = {}
    hook = denoiser.register_forward_pre_hook(lambda *call: kept.update(call[2]), with_kwargs=True)
    model.main.pipeline(**agreement.arguments(model, agreement.request(name, 0)))
    hook.remove()
    wide = copy.deepcopy(denoiser).double()
    exact, plain = [], []
    for change in (lambda _: None, sharing.grow, lambda module: add(adapter, module)):
        change(wide)
        change(denoiser)
        plain.append(denoiser(**kept)[0])
        exact.append(wide(**{key: widened(value) for key, value in kept.items()})[0])
    return sharing.Known(checkpoint, adapter, kept, exact, plain)


def add(adapter: Path, module: nn.Module) -> None:
    """Add the adapter's products to the weights."""
    factors = load_file(adapter / "adapter_model.safetensors")
    for path, layer in agreement.layers_of(module, MADE).items():
        down, up = (factors[f"base_model.model.{path}.lora_{one}.weight"].double() for one in "AB")
        layer.weight += (up @ down).to(layer.weight.dtype)


def widened(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize(
    ("sizes", "backend"),
    chosen(
        ({"tp": 2}, "eager"),
        ({"sp": 2}, "eager"),
        nightly=[({"sp": 2, "tp": 2}, "eager"), ({"tp": 2}, "inductor"), ({"sp": 2}, "inductor")],
    ),
    ids=str,
)
def test_compiled_ranks_change_together_and_are_as_near_to_fp64_as_the_plain_whole(
    sizes: dict[str, int], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    names = chosen("flux", nightly=["wan" if "sp" in sizes else "qwenimage"])
    on_mesh(sizes, sharing.compiles, backend, [known(name, tmp_path) for name in names])


@pytest.mark.parametrize(
    ("sizes", "backend"),
    chosen(
        ({"cfg": 2}, "eager"),
        nightly=[
            ({"cfg": 2, "sp": 2}, "eager"),
            ({"cfg": 2, "tp": 2}, "eager"),
            ({"cfg": 2}, "inductor"),
            ({"cfg": 2, "sp": 2}, "inductor"),
        ],
    ),
    ids=str,
)
def test_ranks_that_share_rows_draw_what_one_draws_though_one_half_compiles_later(
    sizes: dict[str, int], backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    if "sp" in sizes:
        families = [without_unequal_parts(splitting.drawn_by_one_rank("flux", tmp_path))]
    else:
        families = [splitting.drawn_by_one_rank(name, tmp_path) for name in chosen("zimage", nightly=["qwenimage"])]
    on_mesh(sizes, dividing.halves_draw_as_one_rank, backend, families)


def without_unequal_parts(drawn: splitting.Drawn) -> splitting.Drawn:
    """Without the request that runs eagerly, because ranks cannot divide its sequence equally."""
    kept = [index for index in range(len(drawn.requests)) if index != 2]
    requests, pictures = ([values[index] for index in kept] for values in (drawn.requests, drawn.pictures))
    return replace(drawn, requests=requests, pictures=pictures)
