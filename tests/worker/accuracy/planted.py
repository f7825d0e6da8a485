"""Errors put into components as the runtime has loaded them; in a module that other processes can import."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import torch
from torch import nn
from torch.utils import _pytree as pytree

from safelight.worker.accuracy import compare
from safelight.worker.accuracy.task import DTYPES
from safelight.worker.parallel.ranks import Ranks
from safelight.worker.weights.checkpoint.components import component_classes

from .families import Found, keep_references, rows


@dataclass(frozen=True)
class Target:
    """A component, and its tensors (or module) that an error is put into. What a kind does not have is empty."""

    family: str
    component: str
    divided: str
    square: str
    bias: str
    output: str


_LAYER = "model.language_model.layers.0.self_attn"
TARGETS = {
    "transformer": Target(
        family="flux",
        component="transformer",
        divided="transformer_blocks.0.attn.to_v.weight",
        square="transformer_blocks.0.attn.to_v.weight",
        bias="transformer_blocks.0.norm1.linear.bias",
        output="",
    ),
    "text_encoder": Target(
        family="qwenimage",
        component="text_encoder",
        divided=f"{_LAYER}.v_proj.weight",
        square=f"{_LAYER}.o_proj.weight",
        bias=f"{_LAYER}.v_proj.bias",
        output="",
    ),
    "vae": Target(
        family="flux",
        component="vae",
        divided="",
        square="decoder.mid_block.resnets.0.conv1.weight",
        bias="decoder.conv_out.bias",
        output="decoder",
    ),
}


def swapped_shard(module: nn.Module, target: Target, ranks: Ranks) -> None:
    weight = _tensor(module, target.divided)
    weight.copy_(ranks.all_gather(weight)[1 - ranks.rank])


def transposed_block(module: nn.Module, target: Target, ranks: Ranks) -> None:
    weight = _tensor(module, target.square)
    side = min(weight.shape[:2])
    weight[:side, :side] = weight[:side, :side].transpose(0, 1).clone()


def missing_bias(module: nn.Module, target: Target, ranks: Ranks) -> None:
    _tensor(module, target.bias).zero_()


def output_times_two(module: nn.Module, target: Target, ranks: Ranks) -> None:
    def double(leaf: Any) -> Any:
        return leaf * 2 if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    module.get_submodule(target.output).register_forward_hook(lambda _, args, out: pytree.tree_map(double, out))


def on_one_rank_alone(module: nn.Module, target: Target, ranks: Ranks) -> None:
    if ranks.rank == 1:
        output_times_two(module, target, ranks)


def last_output_scaled(module: nn.Module, target: Target, ranks: Ranks) -> None:
    """One of many tensors; the text encoder returns all its hidden states, and the last of them last."""

    def scale(output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        return pytree.tree_unflatten([*leaves[:-1], leaves[-1] * 1.5], spec)

    module.register_forward_hook(lambda _, args, out: scale(out))


Error = Callable[[nn.Module, Target, Ranks], None]

ERRORS: dict[str, Error] = {
    function.__name__: function
    for function in (
        swapped_shard, transposed_block, missing_bias, output_times_two, on_one_rank_alone, last_output_scaled,
    )
}  # fmt: skip


def cases() -> list[tuple[str, str]]:
    """Kind of component and name of the error."""
    every = [(kind, error) for kind in TARGETS for error in ERRORS]
    vae_is_whole_on_every_rank = ("vae", "swapped_shard")
    return [
        (kind, error)
        for kind, error in every
        if (kind, error) != vae_is_whole_on_every_rank and (error != "last_output_scaled" or kind == "text_encoder")
    ]


def plant(ranks: Ranks, folder: Path, result: Path) -> None:
    """Write the rows of each case, by "kind error dtype"."""
    gc.freeze()
    keep_references(folder)
    found: Found = {}
    for kind, error in cases():
        target = TARGETS[kind]
        checkpoint = folder / target.family
        components = {target.component: component_classes(checkpoint)[target.component]}
        with patch.object(compare, "runtime", _altered(target, ERRORS[error], ranks)):
            for dtype in DTYPES:
                found[f"{kind} {error} {dtype}"] = rows(ranks, checkpoint, components, dtype)
    if ranks.rank == 0:
        result.write_bytes(msgspec.msgpack.encode(found))


def _altered(target: Target, error: Error, ranks: Ranks) -> Callable[..., nn.Module]:
    """Loads as the runtime does, and then puts the error in."""
    load = compare.runtime

    def wrong(*args: Any, **options: Any) -> nn.Module:
        module = load(*args, **options)
        error(module, target, ranks)
        return module

    return wrong


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    return dict(module.named_parameters())[name].data
