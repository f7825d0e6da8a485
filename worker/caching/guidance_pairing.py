"""Guidance pairing: the calls with which a pipeline asks its denoiser several times in a step become one forward.

The pipeline makes the calls one after the other. So when the first one of a step arrives, the others are predicted from
the last step, and made beside it. A call that then arrives as predicted has its answer; any other is made as usual, so
that no answer depends on a prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..crossing.call import Call
from ..crossing.chain import Proceed
from ..forward.signature import Signatures
from .late_check import LateCheck
from .latents import is_of_whole_denoiser, is_same, latents
from .prediction import Follower, Prediction, learn, predict

_MAX_FOLLOWERS = 3
"""Calls of a step beside its first one that are predicted."""

_MAX_LEARNED_STEPS = 4
"""Steps from which the form of the calls is learned. A pipeline that changes its form more often is left alone."""


@dataclass(slots=True)
class PairingCounts:
    """Calls since the start that were made beside a step's first one, and those of them that never came."""

    predicted: int = 0
    missed: int = 0


@dataclass(frozen=True, slots=True)
class _First:
    """The first call of a step, with the versions of its latents."""

    call: Call
    latents: list[torch.Tensor]
    versions: list[int]

    def is_of_same_step(self, call: Call) -> bool:
        others = latents(call)
        return (
            call.name == self.call.name
            and len(others) == len(self.latents)
            and all(map(is_same, others, self.latents, self.versions))
        )


class GuidancePairing:
    """The interceptor of one request. ``unmergeable`` names the calls that cannot share forwards.

    It must be the last one of its chain.
    """

    def __init__(self, counts: PairingCounts, unmergeable: Mapping[str, str]) -> None:
        self._counts = counts
        self._unmergeable = unmergeable
        self._signatures = Signatures()
        self._late = LateCheck()
        self._first: _First | None = None
        self._followers: list[Call] = []
        self._expected: list[tuple[Prediction, Any]] = []
        self._is_as_learned = True
        self._learned: dict[str, list[Follower]] = {}
        self._learned_steps = 0

    def __call__(self, call: Call, proceed: Proceed) -> Any:
        if self._first is not None and self._first.is_of_same_step(call) and call.around is None:
            return self._follow(call, proceed)
        self._end_step()
        if not is_of_whole_denoiser(call) or call.around is not None or call.name in self._unmergeable:
            (answer,) = proceed(call)
            return answer
        return self._begin_step(call, proceed)

    def settle(self) -> None:
        """Wait for the last comparison. Raises ``PredictionWrong``; required before the sample's result is used."""
        self._late.settle()

    def _begin_step(self, call: Call, proceed: Proceed) -> Any:
        own = latents(call)
        if not own or self._learned_steps == _MAX_LEARNED_STEPS or any(tensor.is_inference() for tensor in own):
            (answer,) = proceed(call)
            return answer
        self._first = _First(call, own, [tensor._version for tensor in own])
        found = (predict(call, follower) for follower in self._learned.get(call.name, ()))
        predictions = [prediction for prediction in found if prediction is not None]
        answer, *others = proceed(call, *[prediction.call for prediction in predictions])
        self._expected = list(zip(predictions, others, strict=True))
        self._counts.predicted += len(predictions)
        return answer

    def _follow(self, call: Call, proceed: Proceed) -> Any:
        self._followers.append(call)
        for index, (prediction, answer) in enumerate(self._expected):
            if prediction.matches(call, self._late):
                del self._expected[index]
                return answer
        self._is_as_learned = False
        (answer,) = proceed(call)
        return answer

    def _end_step(self) -> None:
        """Discard the answers that nobody has asked for, and learn from a step that was not as the last one."""
        first, followers = self._first, self._followers
        self._first, self._followers = None, []
        self._counts.missed += len(self._expected)
        if first is not None and (self._expected or not self._is_as_learned):
            self._learned_steps += 1
            found = [learn(first.call, call, self._signatures) for call in followers[:_MAX_FOLLOWERS]]
            self._learned[first.call.name] = [follower for follower in found if follower is not None]
        self._expected, self._is_as_learned = [], True
