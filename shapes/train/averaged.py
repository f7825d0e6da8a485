"""A model in training: its optimizers, the moving average of its weights, and one checkpoint of them all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .run import Report, Run, load, one_cycle, save

EMA_DECAY = 0.999

Model = TypeVar("Model", bound=nn.Module)


class Averaged(Generic[Model]):
    """`model` on the run's device, and `average`, the weights to sample with. `start` is the first step to do.

    The checkpoint is `STAGE.pt` under the run's folder; what it holds is taken up at once.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        steps: int,
        model: Model,
        optimizers: Callable[[Model], list[torch.optim.Optimizer]],
    ) -> None:
        self._path, self._device, self._steps = run.checkpoint(stage), run.device, steps
        self.model = model.to(run.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self._optimizers = optimizers(self.model)
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]
        self.start = self._resume()

    def descend(self, step: int, loss: Tensor) -> None:
        """One step of optimisation down the gradient of `loss`, at the rate of `step`."""
        self._set_rates(step)
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._follow(step)

    def _set_rates(self, step: int) -> None:
        factor = one_cycle(step, self._steps, flat=0.4)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor

    def _follow(self, step: int) -> None:
        """Moves the average towards the model, faster at first (Karras et al., 2022, use the same ramp-up)."""
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for average, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(current.detach(), 1 - decay)

    def save(self, step: int) -> None:
        """Writes the checkpoint after `step` steps."""
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        save(self._path, state)

    def _resume(self) -> int:
        state = load(self._path, self._device)
        if state is None:
            return 0
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, stored in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        return int(state["step"])


class Training(Protocol[Model]):
    """A stage that trains a model with an average; `start` is the first step to do."""

    average: Model
    start: int

    def step(self, step: int) -> float:
        """One step of optimisation; returns the error to report."""
        ...

    @property
    def save(self) -> Callable[[int], None]: ...


def train_with_looks(
    stage: str,
    training: Training[Model],
    steps: int,
    look: Callable[[Model, int], str],
    *,
    save_every: int,
    look_every: int,
) -> Model:
    """Takes the steps that are left; returns the average. `look` is shown it now and then, and at the end."""
    report = Report(stage, training.start, steps)
    for step in report.steps():
        report.update(step, mse=training.step(step))
        last = step + 1 == steps
        if (step + 1) % save_every == 0 or last:
            training.save(step + 1)
        if (step + 1) % look_every == 0 or last:
            report.note(look(training.average, step + 1))
    return training.average
