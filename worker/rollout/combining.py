"""How a pipeline combines the denoiser's answers to a step's velocity: found out by trying rules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...rollout.guidance import GUIDED, Rule, guided
from .late_values import LateNumbers

_EXACT_ENOUGH = 1e-3
"""A rule is the pipeline's if it reproduces the velocity within this relative L2 distance."""


@dataclass(frozen=True, slots=True)
class Combined:
    """How a step's velocity was computed: ``sign`` times the denoiser's answers, guided by ``rule`` and ``scale``.

    ``widened``: the answers were cast to fp32 first. ``swapped``: the positive answer is the second.
    """

    rule: Rule
    scale: float
    sign: int
    widened: bool
    swapped: bool


class Trial:
    """Ways to combine a step's ``answers``, and how far each is from the step's ``velocity``."""

    def __init__(self, answers: list[torch.Tensor], velocity: torch.Tensor, tried: list[Combined]) -> None:
        self.answers = answers
        self.velocity = velocity
        self.tried = tried
        self._distances = LateNumbers([_distance(one, answers, velocity) for one in tried]) if tried else None

    @property
    def is_late(self) -> bool:
        return self._distances is not None and self._distances.is_late

    def best(self) -> Combined | None:
        """The one that fits best; ``None`` if none fits."""
        if self._distances is None:
            return None
        distance, best = min(zip(self._distances.read(), self.tried, strict=True), key=lambda pair: pair[0])
        return best if distance < _EXACT_ENOUGH else None


def possible(answers: int, scales: Sequence[float]) -> Iterator[Combined]:
    """Ways to combine one answer, or two with any of ``scales``."""
    if answers == 1:
        for sign in (1, -1):
            yield Combined("none", 1.0, sign, widened=False, swapped=False)
        return
    for scale, sign, rule in itertools.product(scales, (1, -1), GUIDED):
        for widened, swapped in itertools.product((False, True), (False, True)):
            yield Combined(rule, scale, sign, widened=widened, swapped=swapped)


def _distance(how: Combined, answers: list[torch.Tensor], velocity: torch.Tensor) -> torch.Tensor:
    """The relative L2 distance of the combined answers from ``velocity``, without dimensions."""
    positive, negative = (answers[0], None) if len(answers) == 1 else (answers[how.swapped], answers[not how.swapped])
    made = how.sign * guided(how.rule, positive, negative, how.scale, widened=how.widened)
    if made.device.type == "cpu" and made.dtype is velocity.dtype and torch.equal(made, velocity):
        return torch.zeros(())
    distance: torch.Tensor = (made.float() - velocity.float()).norm() / velocity.float().norm().clamp_min(1e-30)
    return distance
