"""The random numbers of whoever gives torch no generator: those of the process, which all coroutines share.

Pipelines seed them and a component's ``generate`` draws (GLM-Image), and components draw by themselves (LTX-Video's
decoder). So each coroutine's are put away while it waits, as its settings are, and its calls are made with them. A
sample's begin with its seed, as after ``torch.manual_seed(seed)``: the same request draws the same, on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

RandomState = tuple[torch.Tensor, ...]
"""A state for the CPU's generator, and one for each GPU's when there is a CUDA context."""


def random_state() -> RandomState:
    return tuple(generator.get_state() for generator in _generators())


def set_random_state(state: RandomState) -> None:
    for generator, own in zip(_generators(), state, strict=False):  # a GPU's may be new
        generator.set_state(own)


def seeded(seed: int) -> RandomState:
    """As ``torch.manual_seed(seed)`` leaves it."""
    return tuple(torch.Generator(one.device).manual_seed(seed).get_state() for one in _generators())


def has_drawn(before: RandomState) -> bool:
    """Whether somebody has drawn random numbers, or has seeded them, since the state was ``before``."""
    return not all(map(torch.equal, before, random_state()))


@contextmanager
def kept_random_state() -> Iterator[RandomState]:
    """Around what may draw: afterwards the state is as it was."""
    before = random_state()
    try:
        yield before
    finally:
        set_random_state(before)


def _generators() -> tuple[torch.Generator, ...]:
    return (torch.default_generator, *torch.cuda.default_generators)
