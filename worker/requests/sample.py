"""A sample: one call of the pipeline, for one prompt and seed, with its progress and result."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ...process.logs import request_id_var
from ...protocol.errors import InvalidRequest
from ...protocol.generation import Generate
from ...protocol.rollouts import Rollout
from ..caching.caching import Caching
from ..caching.late_check import PredictionWrong
from ..caching.savings import NOTHING_SAVED
from ..crossing.chain import Chain, Interceptor
from ..crossing.coroutine import Coroutine
from ..crossing.fork import Fork, schedulers
from ..crossing.interceptors import Clock, NoiseCheck, Recorder, is_of_denoiser
from ..crossing.random_state import kept_random_state, seeded, set_random_state
from ..crossing.steps import DenoisingStep, watch_steps
from ..lora.rank_adapters import RequestedAdapters
from ..media.sound import Sound, first_sound
from ..model.model import Model
from ..model.pipeline_task import PipelineTask
from ..rollout.environment import Environment, likely_scales
from ..rollout.initial_noise import usual_shapes
from ..rollout.peak_memory import Measurement
from ..rollout.record import as_output, nothing_recorded, recorded_fields
from ..rollout.sampling import RolloutSampler, why_no_rollouts
from ..rollout.schedule import follow, shift
from .arguments import sample_arguments
from .failure import NotFinite
from .outputs import first_output
from .prompt_encoding import encode, stop_at_denoiser, values

log = logging.getLogger(__name__)


class SampleRun:
    """Sample ``index`` of ``request`` as a coroutine.

    ``on_step`` is called after each denoising step, in the coroutine; ``on_end`` at the end, in the batcher.
    ``watches_all`` is the fork's; it is implied for exclusive requests. Without ``caching``, no forward is saved.
    """

    def __init__(
        self,
        model: Model,
        request: Generate,
        index: int,
        on_step: Callable[[SampleRun, DenoisingStep], None],
        on_end: Callable[[SampleRun], None],
        wanted: RequestedAdapters = None,
        *,
        watches_all: bool = False,
        caching: Caching | None = None,
    ) -> None:
        self.request = request
        self.index = index
        self.seed = request.samples[index].seed
        self.clock = Clock()
        self.steps = 0
        self.embeddings: dict[str, torch.Tensor] | None = None
        """The tensors of an encode-only request, once the sample has ended."""
        self.rolled_out: dict[str, Any] | None = None
        """The recorded rollout, once the sample has ended."""
        self.sound: Sound | None = None
        """The clip's sound, if it has one, once the sample has ended."""
        self._model = model
        self._on_step = on_step
        self._fork: Fork | None = None
        self._chain = Chain()
        self._environment: Environment | None = None
        self._peak = Measurement()
        self._versions: set[str] = set()  # weight versions of the denoiser's answers since the last step
        self._step_versions: list[str | None] = []
        self.coroutine = self._new_coroutine(on_end, wanted)
        self.watches_all = watches_all or self.coroutine.exclusive
        self.savings = NOTHING_SAVED if caching is None else caching.savings(request, merges=not self.coroutine.alone)

    def _new_coroutine(self, on_end: Callable[[SampleRun], None], wanted: RequestedAdapters) -> Coroutine:
        mode = self._model.batching_mode(self.request)
        coroutine = Coroutine(
            self._run,
            lambda _: on_end(self),
            alone=self.request.deterministic or mode != "merged",
            exclusive=mode == "serial",
            plain=self.request.deterministic,
            wanted=wanted,
            random=seeded(self.seed),
        )
        coroutine.pixels = self._model.output_pixels(self.request)
        return coroutine

    @property
    def task(self) -> PipelineTask:
        """The request's task. Raises ``InvalidRequest`` if the model does not have it."""
        return self._model.task(self.request)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the pipeline's call, with a fresh generator."""
        return sample_arguments(self._model, self.request, self.index)

    def _run(self) -> torch.Tensor:
        request_id_var.set(self.request.request_id)  # of this coroutine's own context
        self.clock.started = time.perf_counter()
        try:
            return self._attempt()
        except PredictionWrong:
            log.warning(
                "a call of the denoiser was not as predicted; the sample begins again, without guidance pairing"
            )
            self.savings = NOTHING_SAVED
            set_random_state(seeded(self.seed))
            return self._attempt()

    def _attempt(self) -> torch.Tensor:
        arguments = self.arguments()
        self._chain = Chain(self.interceptors())
        if self.watches_all:
            self._model.rest()  # what the fork finds, it restores
        self._fork = Fork(self.task.pipeline, self._chain, watches_all=self.watches_all, facts=self._model.facts)
        try:
            with self._fork as pipeline:
                return self._drawn(pipeline, arguments)
        finally:
            self._fork = None

    def _drawn(self, pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> torch.Tensor:
        rollout = self.request.rollout
        if self.request.encode is not None:
            self.embeddings = encode(pipeline, arguments, self.request.encode)
            return values(self.embeddings, self._model.device)
        if rollout is not None:
            self._peak = self._model.peak_memory.begin()
            self._prepare(rollout, pipeline, arguments)
        if rollout is not None and rollout.recorded:
            return self._roll_out(rollout, pipeline, arguments)
        for scheduler in schedulers(pipeline):
            watch_steps(scheduler, self._saw)
        output = pipeline(**arguments)
        self.savings.settle()
        self.sound = first_sound(self.task.pipeline, output)
        pixels = first_output(output)
        if rollout is not None:
            self.rolled_out = self._reply(pixels, rollout, nothing_recorded()) | {"sampler": None}
        return pixels

    def _prepare(self, rollout: Rollout, pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> None:
        """Set the requested schedule, and find out the shape of the initial noise. Raises ``InvalidRequest``."""
        if rollout.flow_shift is not None:
            shift(pipeline, rollout.flow_shift)
        if rollout.sigmas is not None:
            (scheduler,) = self._rolled(pipeline, "sigmas")
            follow(scheduler, rollout.sigmas)
        if rollout.initial_noise:
            with self.aside():
                usual = usual_shapes(self.task.pipeline, arguments, self.seed)
            self._chain.add(NoiseCheck(usual))

    def _rolled(self, pipeline: DiffusionPipeline, field: str) -> list[SchedulerMixin]:
        """The pipeline's only scheduler, in a list. Raises ``InvalidRequest`` if rollouts cannot use it."""
        if (reason := why_no_rollouts(pipeline)) is not None:
            raise InvalidRequest(f"{type(pipeline).__name__} cannot be rolled out: {reason}.", field=field)
        return schedulers(pipeline)

    def _roll_out(self, rollout: Rollout, pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> torch.Tensor:
        (scheduler,) = self._rolled(pipeline, "rollout")
        if rollout.returns_environment:
            scales = likely_scales(pipeline, arguments)
            self._environment = Environment(scales, from_images=bool(self.request.images))
            self._chain.add(Recorder(lambda call: call, self._environment.saw))
        generators = functools.partial(self._step_generator, rollout, arguments["generator"])
        sampler = RolloutSampler(scheduler, rollout, generators, self._took_step)
        watch_steps(scheduler, self._saw, sampler.step)
        pixels = first_output(pipeline(**arguments))
        environment = self._environment.reported() if self._environment is not None else None
        steps = sampler.end()
        if not steps.is_finite:
            raise NotFinite
        recorded = recorded_fields(rollout, steps, environment)
        self.rolled_out = self._reply(pixels, rollout, recorded) | {"sampler": sampler.name}
        return pixels

    def _step_generator(self, rollout: Rollout, own: torch.Generator, step: int) -> torch.Generator:
        """The generator of a step's noise; on the CPU if the steps have seeds, as in trainers."""
        if rollout.step_noise is None:
            return own
        return torch.Generator().manual_seed(rollout.step_noise.seed_of(self.index, self.seed, step))

    def _reply(self, pixels: torch.Tensor, rollout: Rollout, recorded: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": self.request.samples[self.index].prompt,
            "seed": self.seed,
            "generated_output": as_output(pixels, rollout.output_dtype),
            **recorded,
            "inference_time_s": time.perf_counter() - (self.clock.started or self.clock.submitted),
            "peak_memory_mb": self._model.peak_memory.end_mb(self._peak),
            "step_weight_versions": self._step_versions,
            "log_prob_reduction": "mean",
        }

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Isolate another call of the pipeline in this sample's coroutine: neither sees the other's changes."""
        assert self._fork is not None, "the sample runs"
        self._model.rest()
        with self._fork.changes.aside(), kept_random_state():
            yield

    def interceptors(self) -> list[Interceptor]:
        """The chain's interceptors, in order; a rollout adds more."""
        stop = [] if self.request.encode is None else [stop_at_denoiser]
        return [self.clock, *stop, Recorder(is_of_denoiser, self._answered), *self.savings.interceptors]

    def _answered(self, by_denoiser: bool, _: object) -> None:
        if by_denoiser:
            self._versions.add(self._model.weight_version)  # unchanged since the forward

    def _took_step(self, velocity: torch.Tensor, sample: torch.Tensor) -> None:
        """Note the weight version of a rollout's step: ``None`` if the weights changed between its denoiser calls."""
        self._step_versions.append(next(iter(self._versions)) if len(self._versions) == 1 else None)
        self._versions.clear()
        if self._environment is not None:
            self._environment.stepped(velocity, sample)

    def _saw(self, step: DenoisingStep) -> None:
        self.steps = step.number
        self.clock.last_step = time.perf_counter()
        self.savings.stepped(step)
        self._on_step(self, step)
