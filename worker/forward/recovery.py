"""What happens when a forward fails: fewer calls at a time, down to one, whose failure is its request's.

A forward of several ranks fails on all of them or, as far as anybody goes on after it, on none.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

import torch

from ..lora.rows import CannotMix
from .batch import Forward, Outcome, Pending
from .collate import NotDivisible
from .policy import MergePolicy
from .runner import Runner
from .stages import DrawsRandomNumbers

log = logging.getLogger(__name__)

Deliver = Callable[[Pending, Outcome], None]
"""Lets the coroutine of a call go on with its outcome."""


Agree = Callable[[str], None]
"""Says to the other ranks of the replica how this one has failed, and returns when all have failed alike.

Otherwise it ends the replica (with :class:`..parallel.ranks.RankLost`): smaller forwards on this rank would meet the
failed one's collectives on the others.
"""


class Recovery:
    """Makes forwards by ``runner``, and teaches ``policy`` by those that fail. ``free`` gives caches back.

    What it does after a failure, ``agree`` has to allow; of forwards that succeed, it hears nothing.
    """

    def __init__(self, runner: Runner, policy: MergePolicy, free: Callable[[], None], agree: Agree) -> None:
        self.merged_names: set[str] = set()
        """Calls that have met in a forward, by name."""
        self._runner = runner
        self._policy = policy
        self._free = free
        self._agree = agree

    def run(self, forward: Forward, deliver: Deliver) -> bool:
        """Deliver what each call returned or raised, as soon as that is known. Returns whether all did well.

        A smaller forward begins when the answers of the one before are delivered, so that no more is held at once.
        """
        if not forward.merged:
            return self._alone(forward, deliver)
        if forward.positions > self._policy.max_positions(forward.name):  # known since it was put together
            return self._each(forward.halves(), deliver)
        smaller, suspect = list[Forward](), False
        try:
            answers = self._answers(forward)
        except (torch.OutOfMemoryError, CannotMix, NotDivisible, DrawsRandomNumbers) as reason:
            smaller = self._learn(forward, reason)
        except torch.AcceleratorError:  # the device is broken for this process, and no request's fault
            raise
        except Exception:  # one of the calls: alone, each shows which
            number = len(forward.calls)
            log.warning("a forward of %d calls to %s failed; they run one by one", number, forward.name, exc_info=True)
            smaller, suspect = forward.single(), True
        if smaller:
            all_well = self._each(smaller, deliver)
            if all_well and suspect:
                self._policy.keep_apart(forward.parts[0].signature)
            return all_well
        self.merged_names.add(forward.name)
        self._policy.fitted(forward.name)
        for pending, answer in zip(forward.calls, answers, strict=True):
            deliver(pending, Outcome(answer))
        return True

    def _alone(self, forward: Forward, deliver: Deliver) -> bool:
        try:
            (answer,) = self._answers(forward)
        except torch.OutOfMemoryError as error:
            self._free()
            outcome = Outcome(error=error)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001  # goes to the coroutine that made the call
            outcome = Outcome(error=error)
        else:
            self._policy.fitted(forward.name)
            outcome = Outcome(answer)
        deliver(forward.calls[0], outcome)
        return outcome.error is None

    def _answers(self, forward: Forward) -> list[Any]:
        """Raises what the forward has raised on every rank, and holds none of its tensors."""
        try:
            return self._runner.answers(forward)
        except torch.AcceleratorError:  # the end of this process, which the others see by themselves
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            number, calls = self._runner.counters.forwards, len(forward.calls)
            self._agree(f"forward {number}, {calls} calls to {forward.name}, has raised {type(error).__name__}")
            raise

    def _learn(self, forward: Forward, reason: Exception) -> list[Forward]:
        """The smaller forwards to make instead, and what is remembered for later ones."""
        name, policy = forward.name, self._policy
        match reason:
            case torch.OutOfMemoryError():
                self._free()
                policy.lower_cap(name, forward.positions)
                log.warning("%d calls to %s are too many for the memory; halves are tried", len(forward.calls), name)
                return forward.halves()
            case CannotMix():
                log.info("requests with different adapters take turns in %s: %s", name, reason)
                policy.take_turns(name)
                return forward.by_adapters()
            case NotDivisible():
                policy.never_merge(name, f"its output cannot be divided: {reason}")
            case _:
                policy.never_merge(name, "it draws random numbers, which are each request's own")
        return forward.single()

    def _each(self, smaller: list[Forward], deliver: Deliver) -> bool:
        all_well = True
        for forward in smaller:
            all_well &= self.run(forward, deliver)
        return all_well
