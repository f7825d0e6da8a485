"""Noise in place of weights. Tensors that share memory have the same."""

import torch
from torch import nn

from safelight.protocol.tensor_sources import Noise
from safelight.worker.weights.checkpoint.layout import Layout
from safelight.worker.weights.update.noise import noise


def tied() -> dict[str, Layout]:
    """Two modules in which three tensors are one."""
    first, second = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), nn.Linear(2, 2)
    first["b"].weight = second.weight = first["a"].weight
    return {"first": Layout.whole(first), "second": Layout.whole(second)}


def test_a_tensor_that_is_skipped_keeps_its_values_under_every_name_that_it_has() -> None:
    drawn = noise(Noise(["first", "second"], 1, ["a.weight"]), tied())
    assert {module: set(names) for module, names in drawn.items()} == {
        "first": {"a.bias", "b.bias"},
        "second": {"bias"},
    }


def test_tensors_in_one_memory_are_drawn_once_over_all_modules() -> None:
    drawn = noise(Noise(["first", "second"], 1, []), tied())
    assert set(drawn["first"]) == {"a.weight", "a.bias", "b.bias"}
    assert set(drawn["second"]) == {"bias"}


def test_noise_is_not_what_untrained_norms_are_full_of_in_any_dtype() -> None:
    for seed in range(200):
        (value,) = noise(Noise(["norm"], seed, ["bias"]), {"norm": Layout.whole(nn.LayerNorm(1))})["norm"].values()
        assert not any(value.to(dtype).item() in (0.0, 1.0) for dtype in (torch.bfloat16, torch.float8_e5m2))
