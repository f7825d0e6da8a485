"""Sequence parallelism: each rank computes its part of a denoiser's tokens, and attention exchanges tokens for heads.

The plan is diffusers' own (``_cp_plan``): which inputs are split, and which output is gathered. So is the exchange in
attention (Ulysses, https://arxiv.org/abs/2309.14509): there each rank has all tokens and its part of the heads. The
split and the gather are plain hooks of torch here. diffusers' own replace ``forward`` in the module, where no adapter
could take part any more.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from ..internals import diffusers as internals
from .plan import matching
from .ranks import Ranks


class CannotSplit(Exception):
    """A module's sequences cannot be divided among so many ranks; the message says why."""


HEADS_IN_MASK = frozenset({"LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"})
"""Classes with a plan whose attention masks have a row for each head, which diffusers' exchange leaves whole."""


def check_split(module: nn.Module, tp: int, size: int) -> None:
    """Raise ``CannotSplit`` unless ``size`` ranks, each with the weights of ``tp``, can share the module's tokens."""
    what = type(module).__name__
    if not plan_of(module):
        raise CannotSplit(f"diffusers has no context-parallel plan for {what}; serve it with --ulysses 1")
    if what in HEADS_IN_MASK:
        raise CannotSplit(f"the attention masks of {what} have a row for each head; serve it with --ulysses 1")
    if not attention_of(module):
        raise CannotSplit(f"the attention of {what} cannot exchange tokens for heads; serve it with --ulysses 1")
    for name, heads in head_counts(module).items():
        if heads % (tp * size):
            possible = [n for n in range(1, heads + 1) if heads % (tp * n) == 0]
            share = (
                f"its {name} is {heads}" if tp == 1 else f"each of {tp} tensor-parallel ranks has {heads / tp:g} heads"
            )
            raise CannotSplit(
                f"{size} ranks cannot share the attention of {what}, because {share}; "
                f"--ulysses can be {', '.join(map(str, possible))}"
            )


def plan_of(module: nn.Module) -> Mapping[str, Any]:
    """diffusers' plan; empty if the class has none, as classes of transformers."""
    return getattr(type(module), "_cp_plan", None) or {}


def head_counts(module: nn.Module) -> dict[str, int]:
    config: Any = module.config
    return {name: value for name, value in config.items() if name.endswith("num_attention_heads")}


def attention_of(module: nn.Module) -> list[Any]:
    """The attention processors that can exchange tokens for heads."""
    kinds = (internals.Attention, internals.AttentionModuleMixin)
    found = [part.processor for part in module.modules() if isinstance(part, kinds)]
    return [processor for processor in found if hasattr(processor, "_parallel_config")]


def exchange_of(module: nn.Module) -> Any:
    """The configuration of the exchange in the attention of ``module``; ``None`` if no ranks share its tokens."""
    found = [processor._parallel_config for processor in attention_of(module)]
    parallel = next((config for config in found if config is not None), None)
    return None if parallel is None else parallel.context_parallel_config


def split_sequence(module: nn.Module, ranks: Ranks) -> None:
    """Have each rank compute its part of the tokens; outputs are whole on every rank. Requires :func:`check_split`."""
    config = internals.ContextParallelConfig(ulysses_degree=ranks.size)
    assert ranks.group is not None
    config._rank, config._world_size, config._device = ranks.rank, ranks.size, ranks.device
    config._ulysses_mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
    parallel = internals.ParallelConfig(context_parallel_config=config)
    for processor in attention_of(module):
        processor._parallel_config = parallel
    internals.use_exchange(ranks.exchange)
    tokens = Tokens(ranks, config)
    module.register_forward_pre_hook(lambda *_: tokens.begin())
    for pattern, styles in plan_of(module).items():
        for _, part in matching(module, pattern):
            _add_hooks(part, styles, tokens)


def _add_hooks(part: nn.Module, styles: Any, tokens: Tokens) -> None:
    if isinstance(styles, internals.ContextParallelOutput):
        part.register_forward_hook(lambda _, args, output: tokens.gather(output, styles.gather_dim))
        return
    inputs = {name: style for name, style in styles.items() if not style.split_output}
    outputs = {index: style for index, style in styles.items() if style.split_output}
    if inputs:
        names = list(inspect.signature(type(part).forward).parameters)[1:]
        part.register_forward_pre_hook(SplitInputs(names, inputs, tokens), with_kwargs=True)
    if outputs:
        part.register_forward_hook(SplitOutputs(outputs, tokens))


class Tokens:
    """This rank's part of sequences. Ranks' parts differ by one token where the number of ranks does not divide all."""

    def __init__(self, ranks: Ranks, config: Any) -> None:
        self._ranks = ranks
        self._config = config

    def begin(self) -> None:
        """Begin a forward, in which parts are equal until a sequence is split into unequal ones."""
        self._config.ulysses_anything = False

    def split(self, tensor: torch.Tensor, style: Any) -> torch.Tensor:
        """This rank's part along the style's dimension; a tensor of another number of dimensions stays whole."""
        if style.expected_dims is not None and tensor.ndim != style.expected_dims:
            return tensor
        length = tensor.shape[style.split_dim]
        if length % self._ranks.size:
            self._config.ulysses_anything = True  # attention then sends the lengths first
        return tensor.tensor_split(self._ranks.size, dim=style.split_dim)[self._ranks.rank]

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The whole along ``dim``, of every rank's part."""
        if not self._config.ulysses_anything:
            return torch.cat(self._ranks.all_gather(tensor), dim=dim)
        parts = tensor.movedim(dim, 0)
        lengths = [int(length) for length in self._ranks.all_gather(torch.tensor([len(parts)]))]
        padded = functional.pad(parts, (*(0, 0) * (parts.ndim - 1), 0, max(lengths) - len(parts)))
        gathered = self._ranks.all_gather(padded)
        whole = torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])
        return whole.movedim(0, dim)


@dataclass(frozen=True, slots=True)
class SplitInputs:
    """A pre-hook that splits arguments: ``styles`` by parameter, of the forward's ``names`` in their order."""

    names: list[str]
    styles: Mapping[str, Any]
    tokens: Tokens

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        split = {
            name: self.tokens.split(given[name], style)
            for name, style in self.styles.items()
            if given.get(name) is not None
        }
        positional = tuple(split.get(name, value) for name, value in zip(self.names, args, strict=False))
        return positional, {name: split.get(name, value) for name, value in kwargs.items()}


@dataclass(frozen=True, slots=True)
class SplitOutputs:
    """A hook that splits parts of the output: ``styles`` by their index."""

    styles: Mapping[int, Any]
    tokens: Tokens

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return tuple(
            self.tokens.split(part, self.styles[index]) if index in self.styles else part
            for index, part in enumerate(output)
        )
