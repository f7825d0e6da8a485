"""Plain optimisation of one module: AdamW down a loss, resuming where it stopped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .run import Report, Run, load, one_cycle, save

Loss = Callable[[int], tuple[Tensor, Tensor]]
"""The loss of a step's batch, and the plain error to report."""


def descend(
    run: Run,
    stage: str,
    module: nn.Module,
    steps: int,
    loss: Loss,
    *,
    rate: float,
    every: int,
    error: str = "l1",
) -> None:
    """Trains `module` for `steps` steps at the peak rate `rate`; every `every` steps its state goes to `STAGE.pt`.

    `error` is the name under which the plain error is reported.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    start = _resume(run, stage, module, optimizer)
    report = Report(stage, start, steps)
    for step in report.steps():
        for group in optimizer.param_groups:
            group["lr"] = rate * one_cycle(step, steps)
        value, plain = loss(step)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        report.update(step, **{error: float(plain)})
        if (step + 1) % every == 0 or step + 1 == steps:
            state = {"step": step + 1, "model": module.state_dict(), "optimizer": optimizer.state_dict()}
            save(run.checkpoint(stage), state)


def _resume(run: Run, stage: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    state = load(run.checkpoint(stage), run.device)
    if state is None:
        return 0
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
