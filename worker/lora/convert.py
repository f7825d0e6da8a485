"""Calls diffusers' own converters of adapters, and finds out if they lose anything.

A converter takes and gives a dictionary of tensors; what it leaves out, it says in a log at best, and some multiply the
alphas into the factors. So every tensor that goes in knows its name, which passes to what is made of it, and every
alpha is made the rank, which scales nothing: afterwards it is known which layer of the file a layer of the model comes
from, and the file's own alpha applies to it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch.utils._pytree import tree_leaves

from ..internals import diffusers as internals
from .pairs import Pair, parse_factor

FAILURES = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    NameError,
    AssertionError,
    RuntimeError,
    ArithmeticError,
)
"""The exceptions of converters for files that are not as they expect."""


class NotConverted(Exception):
    """The pipeline's converter does not know these ``names``; none, where it cannot be said which."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = list(names)


class Traced(torch.Tensor):
    """A tensor that knows the names of those that it was made of."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Traced)]
        if made:
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Traced)]
            sources = frozenset[str]().union(*(leaf.sources for leaf in given))
            for leaf in made:
                leaf.sources = sources
        return result


@dataclass(frozen=True, slots=True)
class Converted:
    """A pair under its layer's name in the model, a component's name before it; the ``layers`` of the file it is of."""

    down: torch.Tensor
    up: torch.Tensor
    layers: frozenset[str]


def convert(pairs: Mapping[str, Pair], pipeline: DiffusionPipeline) -> dict[str, Converted]:
    """Every pair, by the name of its layer in the model. Raises ``NotConverted``.

    That no tensor is left out is certain, and that no part of one is, where the results fit the model: converters cut
    the factors up of fused layers in parts of equal or known sizes.
    """
    owners = {name: layer for layer, pair in pairs.items() for name in pair.names}
    halves: dict[str, dict[bool, Traced]] = {}
    for name, tensor in _converted(pairs, pipeline).items():
        if (factor_of := parse_factor(name)) is None or not isinstance(tensor, Traced):
            raise NotConverted([name])
        halves.setdefault(factor_of[0], {})[factor_of[1]] = tensor
    if not halves:
        raise NotConverted([])
    if incomplete := [layer for layer, half in halves.items() if len(half) == 1]:
        raise NotConverted(incomplete)
    _check_nothing_is_lost(pairs, owners, halves)
    found = {layer: _pair(half[False], half[True], owners) for layer, half in halves.items()}
    if turned := [layer for layer, pair in found.items() if any(_is_turned(pair, pairs[of]) for of in pair.layers)]:
        raise NotConverted(turned)
    return found


def _converted(pairs: Mapping[str, Pair], pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """The tensors that diffusers reads from the pairs. Some converters need alphas, others refuse some."""
    if not isinstance(pipeline, internals.LoraBaseMixin):
        raise NotConverted([])
    alphas = {pair.alpha_name: torch.tensor(float(pair.rank)) for pair in pairs.values() if pair.alpha_name is not None}
    factors = {
        name: traced(factor, name)
        for pair in pairs.values()
        for name, factor in zip(pair.names, (pair.down, pair.up), strict=True)
    }
    try:
        return _asked({**factors, **alphas}, pipeline)
    except NotConverted:
        return _asked(dict(factors), pipeline)


def traced(tensor: torch.Tensor, name: str) -> Traced:
    found = tensor.as_subclass(Traced)
    found.sources = frozenset({name})
    return found


def _asked(given: dict[str, torch.Tensor], pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """The tensors as the pipeline's class converts them, under peft's names, without the alphas."""
    unet = pipeline.components.get("unet")
    options = {} if unet is None else {"unet_config": unet.config}  # which SDXL's blocks are numbered by
    try:
        with _quiet():
            result = type(pipeline).lora_state_dict(given, **options)
            found: dict[str, torch.Tensor] = result[0] if isinstance(result, tuple) else result
            texts = {name: tensor for name, tensor in found.items() if name.startswith("text_encoder")}
            rest = {name: tensor for name, tensor in found.items() if name not in texts}
            texts = internals.convert_state_dict_to_peft(texts, original_type=internals.StateDictType.DIFFUSERS_OLD)
            found = internals.convert_unet_state_dict_to_peft({**rest, **texts})
    except FAILURES:
        raise NotConverted([]) from None
    return {name: tensor for name, tensor in found.items() if not name.endswith(".alpha")}


def _check_nothing_is_lost(
    pairs: Mapping[str, Pair], owners: Mapping[str, str], halves: Mapping[str, Mapping[bool, Traced]]
) -> None:
    used = frozenset[str]().union(*(tensor.sources for half in halves.values() for tensor in half.values()))
    lost = {owners[name] for name in owners.keys() - used}
    if left := [layer for layer in pairs if layer in lost and pairs[layer].up.any() and pairs[layer].down.any()]:
        raise NotConverted(left)


def _pair(down: Traced, up: Traced, owners: Mapping[str, str]) -> Converted:
    layers = frozenset(owners[name] for name in down.sources | up.sources)
    return Converted(down.as_subclass(torch.Tensor), up.as_subclass(torch.Tensor), layers)


def _is_turned(pair: Converted, source: Pair) -> bool:
    """True if the halves of the rank have changed places in one factor alone.

    HunyuanVideo's converter swaps scale and shift in both factors, which makes another adapter.
    """
    if pair.down.shape != source.down.shape or torch.equal(pair.down, source.down):
        return False
    return torch.equal(pair.down, torch.cat(source.down.chunk(2)[::-1]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence converters: whatever they leave out, and log, is an error here."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(before)
