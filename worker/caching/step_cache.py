"""The step cache: in steps in which the denoiser's answer would hardly change, a request gets the last one again.

It belongs to one request, so that other requests of the same forward are computed as usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...protocol.step_caching import CacheRule
from ..crossing.answers import cloned, tensors_of
from ..crossing.call import Call, yield_turn
from ..crossing.chain import Proceed
from .latents import is_of_whole_denoiser, latents
from .rules import Rule, new_rule

_WARM_UP = 0.15
"""The share of the steps, from the first one on, that are always computed; so is the last step."""

_MIN_COMPUTED = 2
_MAX_CALLS = 8
"""Calls of one step whose answers are kept."""


@dataclass(slots=True)
class CacheCounts:
    """Calls since the start that requests with a step cache were answered without a forward."""

    skipped: int = 0


@dataclass(frozen=True, slots=True)
class _Kept:
    """The last computed answer to a call, which had the ``form``."""

    form: Hashable
    answer: Any


class StepCache:
    """The interceptor of one request.

    The first call of a step decides for all of its calls, so that guidance never combines answers of different ages.
    ``agreed`` returns one rank's number on all ranks of the replica, so that all of them decide alike.
    """

    def __init__(
        self,
        threshold: float,
        rule: CacheRule,
        counts: CacheCounts,
        agreed: Callable[[float], float] = lambda distance: distance,
    ) -> None:
        self.skipped = 0
        self._threshold = threshold
        self._rule_name: CacheRule = rule
        self._counts = counts
        self._agreed = agreed
        self._steps_left = 0
        self._warm_up_left = _MIN_COMPUTED
        self._position = 0
        self.forget()

    def __call__(self, call: Call, proceed: Proceed) -> Any:
        if not self._may_reuse(call):
            (answer,) = proceed(call)
            return answer
        position, form = (call.name, self._position), _form(call)
        if self._position == 0:
            self._decide(call, is_known=self._known(position, form) is not None)
            if self._skips:  # no forward lets others run in this step, and new weights may come meanwhile
                yield_turn(call.changes)
        kept = self._known(position, form)
        self._position += 1
        if self._skips and kept is not None:
            self.skipped += 1
            self._counts.skipped += 1
            return cloned(kept.answer)
        (answer,) = proceed(call)
        self._keep(position, _Kept(form, answer), call)
        return answer

    def _known(self, position: tuple[str, int], form: Hashable) -> _Kept | None:
        kept = self._kept.get(position)
        return kept if kept is not None and kept.form == form else None

    def _may_reuse(self, call: Call) -> bool:
        """False for calls that write to their component, and for those whose answers are differentiated."""
        plain = is_of_whole_denoiser(call) and call.around is None and not torch.is_grad_enabled()
        return plain and self._position < _MAX_CALLS

    def stepped(self, number: int, total: int) -> None:
        """Note the end of step ``number`` of ``total``. Without it, every call is computed."""
        self._position = 0
        self._steps_left = total - number
        self._warm_up_left = max(_MIN_COMPUTED, math.ceil(_WARM_UP * total)) - number

    def forget(self) -> None:
        """Drop all answers, after the weights have changed."""
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._rule: Rule = new_rule(self._rule_name)
        self._skips, self._distance = False, 0.0

    def _decide(self, call: Call, *, is_known: bool) -> None:
        """Decide whether this step is skipped. Waits once for the device, for one number."""
        if not is_known:
            self._rule = new_rule(self._rule_name)
        found = self._rule.distance(latents(call))
        if found is None or self._warm_up_left > 0 or self._steps_left <= 1:
            self._skips = False
        else:
            self._distance += self._agreed(float(found))
            self._skips = self._distance < self._threshold  # false for NaN
        if not self._skips:
            self._distance = 0.0

    def _keep(self, position: tuple[str, int], computed: _Kept, call: Call) -> None:
        tensors = tensors_of(computed.answer)
        if not latents(call) or tensors is None:
            return
        self._kept[position] = _Kept(computed.form, cloned(computed.answer))
        if position[1] == 0:
            self._rule.computed(latents(call), tensors)


def _form(call: Call) -> Hashable:
    """Calls of one form differ in the values of tensors alone."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    return spec, tuple(_mark(leaf) for leaf in leaves)


def _mark(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return (type(leaf), leaf) if isinstance(leaf, str | int | float | bool | None) else id(leaf)
