"""A rollout is a scheduler that records: it takes a fork's steps, with noise, and keeps what a trainer asks for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ...protocol.errors import InvalidRequest
from ...protocol.rollouts import Rollout
from ...rollout.transitions import Transition, transition
from ..failure import NotFinite
from ..fork import schedulers
from ..steps import first_index

_EULER = "FlowMatchEulerDiscreteScheduler"

MOST_BYTES = 2 << 30
"""Of latents and debug tensors of one sample: they are kept until its end."""


def why_no_rollouts(pipeline: DiffusionPipeline) -> str | None:
    """Why the pipeline's steps cannot be taken by a rollout; ``None`` where they can."""
    found = schedulers(pipeline)
    if len(found) != 1:
        return f"it has {len(found)} schedulers that take steps, and one is needed"
    (scheduler,) = found
    name, config = type(scheduler).__name__, scheduler.config
    flows = name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
    if not flows or not hasattr(scheduler, "sigmas"):
        return f"its {name} does not follow a flow from noise to pictures"
    if config.get("invert_sigmas") or config.get("stochastic_sampling"):
        return f"its {name} goes another way than from noise at 1 to pictures at 0"
    if getattr(scheduler, "order", 1) != 1:
        return f"its {name} calls the denoiser several times for one step"
    return None


@dataclass(slots=True)
class Path:
    """What was recorded, step by step; latents and debug tensors of the steps that are asked for. No batch dimension.

    ``latents`` are by their place: that of step i is x before it, the one behind the last step the final x.
    """

    sigmas: list[float] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    latents: dict[int, torch.Tensor] = field(default_factory=dict)
    log_probs: list[torch.Tensor] = field(default_factory=list)
    noises: list[torch.Tensor] = field(default_factory=list)
    means: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    stds: list[float] = field(default_factory=list)


class RolloutSampler:
    """Takes the steps of ``scheduler``, a fork's own; the state stays in fp32 whatever the model's dtype.

    ``stepped`` hears of each velocity and the state it is of. Noise comes from ``generator``.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        rollout: Rollout,
        generator: torch.Generator,
        stepped: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> None:
        self.path = Path()
        self.name = _name(scheduler, rollout)
        self._scheduler = scheduler
        self._rollout = rollout
        self._generator = generator
        self._stepped = stepped
        self._first: int | None = None
        self._state: torch.Tensor | None = None
        self._given: tuple[torch.Tensor, int] | None = None  # the state as the pipeline has it, and its version
        if rollout.sigmas is not None:
            _follow(scheduler, rollout.sigmas)

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the scheduler's own."""
        if kwargs.get("per_token_timesteps") is not None:
            raise InvalidRequest("This pipeline steps each token by itself, which no rollout can.", field="rollout")
        if self._first is None:
            self._begin(timestep, sample)
        number = len(self.path.log_probs)
        x = self._state_of(sample)
        self._stepped(model_output, sample)
        if self._rollout.sampler == "ode" and type(self._scheduler).__name__ == _EULER:
            own = type(self._scheduler).step(self._scheduler, model_output, timestep, sample, *args, **kwargs)
            reached = own[0] if isinstance(own, tuple) else own.prev_sample
            self._record(number, x, model_output, Transition(reached.float(), 0.0), None, reached.float())
            self._state = self._given = None
            return own
        sampler = self._rollout.sampler if self._is_noisy(number) else "ode"
        taken = transition(sampler, x, model_output, self.path.sigmas, number, self._rollout.noise_level)
        noise = self._noise(x) if taken.std else None
        reached = taken.mean if noise is None else taken.reach(noise)
        self._record(number, x, model_output, taken, noise, reached)
        given = reached.to(sample.dtype, copy=True)  # which the pipeline may write to
        self._state, self._given = reached, (given, given._version)
        return _Stepped(given) if kwargs.get("return_dict", True) else (given,)

    def end(self) -> Path:
        """What was recorded. Raises where the pipeline did not take all steps by this scheduler."""
        if len(self.path.log_probs) != len(self.path.timesteps) or not self.path.log_probs:
            taken, steps = len(self.path.log_probs), len(self.path.timesteps)
            raise InvalidRequest(f"This pipeline took {taken} of {steps} steps by its own scheduler.", field="rollout")
        if not torch.stack(self.path.log_probs).isfinite().all():
            raise NotFinite
        return self.path

    def _begin(self, timestep: Any, sample: torch.Tensor) -> None:
        if len(sample) != 1:
            raise InvalidRequest("This pipeline draws several samples at once, which no rollout can.", field="rollout")
        self._first = first_index(self._scheduler, timestep)
        self.path.sigmas = self._scheduler.sigmas[self._first :].double().tolist()
        self.path.timesteps = self._scheduler.timesteps[self._first :].double().tolist()
        if not all(1 >= sigma > after >= 0 for sigma, after in itertools.pairwise(self.path.sigmas)):
            raise InvalidRequest("This pipeline's sigmas do not fall from at most 1 to 0.", field="rollout")
        told = self._rollout.returns_trajectory + 3 * self._rollout.returns_debug
        if 4 * sample.numel() * (len(self.path.timesteps) + 1) * told > MOST_BYTES:
            raise InvalidRequest(
                f"What is to be told of one sample is more than {MOST_BYTES >> 20} MiB; name steps, or take fewer.",
                field="rollout_return_step_indices",
            )
        for name, steps in (
            ("rollout_sde_step_indices", self._rollout.sde_steps),
            ("rollout_return_step_indices", self._rollout.return_steps),
        ):
            if steps and max(steps) >= len(self.path.timesteps):
                raise InvalidRequest(f"There are {len(self.path.timesteps)} steps, from 0 on.", field=name)

    def _state_of(self, sample: torch.Tensor) -> torch.Tensor:
        """In fp32 what was reached by the last step. Raises where the pipeline has changed it since."""
        if self._state is None or self._given is None:
            return sample.detach().float().clone()
        given, version = self._given
        if (sample is given and sample._version == version) or torch.equal(sample, self._state.to(sample.dtype)):
            return self._state
        raise InvalidRequest(
            "This pipeline changes the latents between steps, so that no log-probability is of what is drawn.",
            field="rollout",
        )

    def _is_noisy(self, number: int) -> bool:
        return self._rollout.sde_steps is None or number in self._rollout.sde_steps

    def _noise(self, x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=self._generator, device=self._generator.device).to(x.device)

    def _record(
        self,
        number: int,
        x: torch.Tensor,
        v: torch.Tensor,
        taken: Transition,
        noise: torch.Tensor | None,
        reached: torch.Tensor,
    ) -> None:
        rollout, path = self._rollout, self.path
        path.log_probs.append(taken.log_prob(reached, no_const=rollout.no_const)[0])
        if rollout.return_steps is not None and number not in rollout.return_steps:
            return
        if rollout.returns_trajectory:
            path.latents[number] = x[0]
            path.latents[number + 1] = reached[0]
        if rollout.returns_debug:
            path.noises.append((torch.zeros_like(x) if noise is None else noise)[0])
            path.means.append(taken.mean[0])
            path.outputs.append(v.detach().float()[0])
            path.stds.append(taken.std)


@dataclass(frozen=True, slots=True)
class _Stepped:
    prev_sample: torch.Tensor


def _name(scheduler: SchedulerMixin, rollout: Rollout) -> str:
    own = type(scheduler).__name__
    return rollout.sampler if own == _EULER else f"{rollout.sampler} (flow-matching Euler in place of {own})"


def _follow(scheduler: SchedulerMixin, sigmas: list[float]) -> None:
    """Have ``scheduler`` take exactly these, whatever the pipeline asks of it, and 0 behind them."""
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def set_ours(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        every = [*sigmas, *([0.0] if sigmas[-1] > 0 else [])]
        scheduler.sigmas = torch.tensor(every, dtype=torch.float32, device=scheduler.sigmas.device)
        steps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
        scheduler.timesteps = steps.to(scheduler.timesteps.device)
        scheduler.num_inference_steps = len(steps)

    vars(scheduler)["set_timesteps"] = set_ours
