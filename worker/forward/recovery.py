"""What happens when a forward fails: fewer calls at a time, down to one, whose failure is its request's."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator

import torch

from ..lora.beside import CannotMix
from .batch import Forward, Outcome, Pending
from .collate import NotDivisible
from .policy import MergePolicy
from .runner import Runner
from .stages import DrawsRandomNumbers

log = logging.getLogger(__name__)

Outcomes = Iterator[tuple[Pending, Outcome]]


class Recovery:
    """Makes forwards by ``runner``, and teaches ``policy`` by those that fail. ``free`` gives caches back."""

    def __init__(self, runner: Runner, policy: MergePolicy, free: Callable[[], None]) -> None:
        self.merged_names: set[str] = set()
        """Calls that have met in a forward, by name."""
        self._runner = runner
        self._policy = policy
        self._free = free

    def outcomes(self, forward: Forward) -> Outcomes:
        """Each call with what it returned or raised, as soon as that is known.

        Whoever iterates passes an outcome on before the next one is made, so that no two failures' or smaller
        forwards' tensors are held at once.
        """
        if not forward.merged:
            yield forward.calls[0], self._alone(forward)
            return
        smaller = None
        try:
            answers = self._runner.answers(forward)
        except Exception as error:  # noqa: BLE001  # one of the calls, or of the ways to batch them
            smaller = self._learn(forward, error)
            traceback.clear_frames(error.__traceback__)  # they hold the failed forward's tensors
        if smaller is not None:
            yield from self._each(forward, smaller)
            return
        self.merged_names.add(forward.name)
        self._policy.fitted(forward.name)
        for pending, answer in zip(forward.calls, answers, strict=True):
            yield pending, Outcome(answer)

    def _alone(self, forward: Forward) -> Outcome:
        try:
            (answer,) = self._runner.answers(forward)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
            self._free()
            return Outcome(error=error)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001  # goes to the coroutine that made the call
            return Outcome(error=error)
        self._policy.fitted(forward.name)
        return Outcome(answer)

    def _learn(self, forward: Forward, error: Exception) -> list[Forward]:
        """The smaller forwards to make instead of one that raised ``error``. Raises it where nothing can be made."""
        name, policy = forward.name, self._policy
        match error:
            case torch.OutOfMemoryError():
                self._free()
                policy.lower_cap(name, forward.positions)
                half = len(forward.calls) // 2
                log.warning("%d calls to %s are too many for the memory; half of them are tried", 2 * half, name)
                return [forward.slice(0, half), forward.slice(half, len(forward.calls))]
            case torch.AcceleratorError():
                raise error
            case CannotMix():
                log.info("requests with different adapters take turns in %s: %s", name, error)
                policy.take_turns(name)
                return forward.by_adapters()
            case NotDivisible():
                policy.never_merge(name, f"its output cannot be divided: {error}")
            case DrawsRandomNumbers():
                policy.never_merge(name, "it draws random numbers, which are each request's own")
            case _:
                log.warning(
                    "a forward of %d calls to %s failed; they run one by one", len(forward.calls), name, exc_info=error
                )
        return forward.single()

    def _each(self, forward: Forward, smaller: list[Forward]) -> Outcomes:
        """If each call does well alone where all together failed, calls with just this signature stay apart."""
        failed = False
        for part in smaller:
            for pending, outcome in self.outcomes(part):
                failed |= outcome.error is not None
                yield pending, outcome
        name = forward.name
        one_by_one = len(smaller) == len(forward.calls) and name not in self._policy.unmergeable
        if one_by_one and not failed and name not in self._policy.caps and not self._policy.takes_turns(name):
            self._policy.keep_apart(forward.parts[0].signature)
