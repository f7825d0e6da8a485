"""torch's global random state, which code without a generator draws from.

Pipelines seed it for a component's ``generate`` (GLM-Image), and components draw from it (LTX-Video's decoder). So each
coroutine has its own: it is swapped out while the coroutine waits, and the coroutine's calls run with it. A sample's
starts as after ``torch.manual_seed(seed)``, so that the same request draws the same numbers on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

RandomState = tuple[torch.Tensor, ...]
"""The state of the CPU's generator, and with a CUDA context that of each GPU's."""


def random_state() -> RandomState:
    return tuple([generator.get_state() for generator in _generators()])  # a list, as generators cost more


def set_random_state(state: RandomState) -> None:
    for generator, own in zip(_generators(), state, strict=False):  # a GPU's generator may have been created since
        generator.set_state(own)


def seeded(seed: int) -> RandomState:
    """The state that ``torch.manual_seed(seed)`` would leave."""
    return tuple(torch.Generator(one.device).manual_seed(seed).get_state() for one in _generators())


def has_drawn(before: RandomState) -> bool:
    """True if the state differs from ``before``: random numbers were drawn, or a seed was set."""
    return not all(map(torch.equal, before, random_state()))


@contextmanager
def kept_random_state() -> Iterator[RandomState]:
    """Restore the random state on leaving the context; yields the state."""
    before = random_state()
    try:
        yield before
    finally:
        set_random_state(before)


def _generators() -> tuple[torch.Generator, ...]:
    return (torch.default_generator, *torch.cuda.default_generators)
