"""Recovery from failed forwards: retry with fewer calls, down to one, whose failure belongs to its request.

With several ranks, a rank retries only if the forward failed on all of them.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

import torch

from .adapters import CannotMix
from .batch import Forward, Outcome, Pending
from .collate import NotDivisible
from .graphs import GraphMiss
from .policy import MergePolicy
from .runner import Runner
from .stages import DrawsRandomNumbers
from .tiling import Tiling

log = logging.getLogger(__name__)

Deliver = Callable[[Pending, Outcome], None]
"""Resumes the coroutine of a call with its outcome."""

Agree = Callable[[str], None]
"""Reports this rank's failure to the replica's other ranks, and returns when all have failed in the same way.

Otherwise it raises :class:`..parallel.ranks.RankLost`, which ends the replica: smaller forwards on this rank would run
into the collectives in which the other ranks still wait.
"""


class Recovery:
    """Runs forwards by ``runner``, and updates ``policy`` after failures.

    ``free`` releases cached memory. ``agree`` is called after each failure, and never after a success. ``tiling`` may
    have another way to run a call that needs too much memory alone.
    """

    def __init__(
        self,
        runner: Runner,
        policy: MergePolicy,
        free: Callable[[], None],
        agree: Agree,
        tiling: Tiling | None = None,
    ) -> None:
        self.merged_names: set[str] = set()
        """Names of calls that were merged."""
        self._runner = runner
        self._policy = policy
        self._free = free
        self._agree = agree
        self._tiling = tiling
        self._tried = 0  # equal on all ranks, unlike the runner's count, as probes depend on a rank's own rows

    def run(self, forward: Forward, deliver: Deliver) -> bool:
        """Run ``forward`` and deliver each call's outcome as soon as it is known. Returns true if all succeeded.

        The answers of a smaller forward are delivered before the next one begins, so that fewer are in memory.
        """
        if not forward.merged:
            return self._alone(forward, deliver)
        if forward.positions > self._policy.max_positions(forward.name):  # the cap fell after the calls were chosen
            return self._each(forward.halves(), deliver)
        smaller, suspect = list[Forward](), False
        try:
            answers = self._answers(forward)
        except (torch.OutOfMemoryError, CannotMix, NotDivisible, DrawsRandomNumbers, GraphMiss) as reason:
            smaller = self._learn(forward, reason)
        except torch.AcceleratorError:  # the device no longer works in this process, whatever the request
            raise
        except Exception:  # run alone, each call shows whether it is the cause
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
        tiled = False
        try:
            (answer,) = self._answers(forward)
        except torch.OutOfMemoryError as error:
            self._free()
            tiled = self._tiling is not None and self._tiling.learn(forward)
            outcome = Outcome(error=error)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001  # raised in the coroutine that made the call
            outcome = Outcome(error=error)
        else:
            self._policy.fitted(forward.name)
            outcome = Outcome(answer)
        if tiled:
            return self._alone(forward, deliver)
        deliver(forward.calls[0], outcome)
        return outcome.error is None

    def _answers(self, forward: Forward) -> list[Any]:
        """Run ``forward``. Raises its exception if every rank has failed, with the frames' tensors released."""
        self._tried += 1
        try:
            return self._runner.answers(forward)
        except torch.AcceleratorError:  # this process exits, which the other ranks notice
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            calls = len(forward.calls)
            self._agree(f"forward {self._tried}, {calls} calls to {forward.name}, has raised {type(error).__name__}")
            raise

    def _learn(self, forward: Forward, reason: Exception) -> list[Forward]:
        """Update the policy, and return the smaller forwards to run instead."""
        name, policy = forward.name, self._policy
        match reason:
            case torch.OutOfMemoryError():
                self._free()
                policy.lower_cap(name, forward.positions)
                log.warning("%d calls to %s ran out of memory; retrying in halves", len(forward.calls), name)
                return forward.halves()
            case GraphMiss():
                return forward.halves()  # fewer rows may have a graph
            case CannotMix():
                log.info("requests with different adapters take turns in %s: %s", name, reason)
                policy.take_turns(name)
                return forward.by_adapters()
            case NotDivisible():
                policy.never_merge(name, f"its output cannot be divided: {reason}")
            case _:
                policy.never_merge(name, "it draws random numbers, which belong to a request")
        return forward.single()

    def _each(self, smaller: list[Forward], deliver: Deliver) -> bool:
        all_well = True
        for forward in smaller:
            all_well &= self.run(forward, deliver)
        return all_well
