"""The batching probe: runs the same small requests apart, interleaved and together, and decides how they may share.

The requests apart are what plain diffusers would compute. Interleaved, they take turns at every call to a component,
which reveals a pipeline that keeps a request's state in a shared object. Together, their calls meet in merged forwards.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import torch

from ...protocol.config import Config
from ...protocol.replicas import BatchingMode
from ..crossing.changes import untraced
from ..crossing.fork import Fork
from ..forward.batcher import Batcher
from ..forward.recovery import Agree
from ..forward.runner import Division
from ..model.model import Model
from ..model.modules import modules
from ..pipelines.sizes import small_sizes
from ..requests.outputs import outputs
from ..requests.preview import preview
from ..requests.sample import SampleRun
from .probe_runs import ProbeRuns, SampleFailed

log = logging.getLogger(__name__)

FP32_TOLERANCE = 1e-4
"""Largest difference of a pixel (in [0, 1]) that merging may make in fp32; about 1e-6 is usual."""

LOW_PRECISION_SHARE = 0.05
"""In bf16 and fp16, and on a GPU, the mean difference that merging may make, as a share of that between requests."""

SPREADS = 4.0
"""On a GPU, the accepted difference of equal runs, in spreads. The spread is the difference of two runs apart."""

_REQUIRED: tuple[dict[str, Any], ...] = (
    {},
    {"negative_prompt": "blurry"},
    {"control_mode": 0},
    {"source_prompt": "a red square"},
    {"token_indices": [1]},
    {"gligen_phrases": ["a red square"], "gligen_boxes": [[0.25, 0.25, 0.75, 0.75]]},
)
"""Arguments that some pipelines require although their signatures give them defaults."""


@dataclass(frozen=True, slots=True)
class BatchingDecision:
    """How a task's requests share forwards; ``unmergeable`` maps calls that must run alone to the reason."""

    mode: BatchingMode
    reason: str
    unmergeable: dict[str, str] = field(default_factory=dict)


class DoesNotRun(Exception):
    """A task's pipeline failed with every size and argument; the message is the last error."""


class BatchingProbe:
    """Runs the small requests for the model's image task, or for its text task.

    ``report`` receives the name of each stage; ``agree`` and ``division`` are the batcher's, for several ranks.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        report: Callable[[str], None],
        agree: Agree,
        division: Division | None,
        *,
        images: bool,
    ) -> None:
        task = model.image if images else model.text
        assert task is not None, "the probed task exists"
        self._model = model
        self._task = task
        self._config = config
        self._report = report
        self._images = images
        self._runs = ProbeRuns(model, task, config, agree, division, images=images)
        self._first = torch.empty(0)
        self._spread: float | None = None

    def probe(self) -> BatchingDecision:
        """Decide how requests share forwards, and set what the task depends on. Raises ``DoesNotRun``."""
        self._report_stage("apart")
        apart = self._first_runs()
        self._first = apart[0]
        self._task.supports_preview = self._preview_matches(apart)
        if self._config.batching == "serial":
            return BatchingDecision("serial", "chosen by --batching")
        self._report_stage("interleaved")
        with untraced(modules(self._task.pipeline).values()):
            interleaved = self._runs.attempt(self._runs.batcher("interleaved"))
        if not self._same(apart, interleaved):
            return BatchingDecision("serial", self._why_serial(apart))
        if self._config.batching == "interleaved":
            return BatchingDecision("interleaved", "chosen by --batching")
        self._report_stage("together")
        return self._together(apart)

    def run_once(self) -> None:
        """Run one small request at the size at which the task is known to run. Raises ``DoesNotRun``."""
        self._report("self-test: one request, as another replica has done the rest")
        names = {name for name, parameter in self._task.arguments.items() if parameter.is_required}
        self._runs.size = self._task.tried_size
        self._runs.required = next(required for required in _REQUIRED if required.keys() == names)
        try:
            self._runs.pictures(self._runs.batcher("serial"), (0,))
        except SampleFailed as failed:
            log.info("the pipeline does not run", exc_info=failed.error)
            raise DoesNotRun(str(failed)) from None

    def takes_several_images(self) -> bool:
        """True if two images make one output that differs from :meth:`probe`'s, which used the first image alone."""
        first, second = self._runs.image(0), self._runs.image(1)
        request = msgspec.structs.replace(self._runs.request(0), images=[first, second])
        run = SampleRun(self._model, request, 0, lambda *_: None, lambda _: None)
        self._task.several_images = True
        try:
            made = self._runs.alone(lambda: self._outputs(run), run.seed)
        except SampleFailed as failed:
            log.info("two images do not make one output (%r)", failed.error)
            return False
        finally:
            self._task.several_images = False
        if len(made) != 1:
            return False
        return made[0].shape != self._first.shape or bool(
            (made[0].float().cpu() - self._first).abs().max() > FP32_TOLERANCE
        )

    def _report_stage(self, stage: str) -> None:
        self._report(f"self-test{' with images' if self._images else ''}: requests {stage}")

    def _first_runs(self) -> list[torch.Tensor]:
        """The pictures apart, at the smallest size and in the first output type with which the pipeline runs.

        Arguments that the pipeline proves to need become required ones.
        """
        errors: list[BaseException] = []
        possible = [required for required in _REQUIRED if required.keys() <= self._task.arguments.keys()]
        for output_type in self._output_types():
            self._task.output_type = output_type
            for size, required in itertools.product(self._sizes(), possible):
                self._runs.size, self._runs.required = size, required
                try:
                    pictures = self._runs.apart()
                except SampleFailed as failed:
                    errors.append(failed.error)
                    continue
                if not all(_has_channels_first(picture) for picture in pictures):
                    errors.append(ValueError(f"its {output_type!r} output has the shape {tuple(pictures[0].shape)}"))
                    break  # the shape is as wrong at any other size
                self._task.tried_size = size
                self._task.require(required.keys())
                return pictures
        log.info("the pipeline does not run", exc_info=errors[-1])
        raise DoesNotRun(f"{type(errors[-1]).__name__}: {errors[-1]}")

    def _output_types(self) -> tuple[Literal["pt", "np"], ...]:
        if self._images and self._model.text is not None:
            return (self._model.text.output_type,)
        return ("pt", "np")

    def _sizes(self) -> list[dict[str, int | None]]:
        """Sizes to try, from small to the pipeline's default; for images, the one at which the text task ran.

        The default may be large, so the small sizes with the pipeline's own number of steps come before it: some
        pipelines have other defaults that fit no other number (a guidance for each step).
        """
        if self._images and self._model.text is not None:
            return [self._model.text.tried_size]
        small: list[dict[str, int | None]] = [
            {**size} for size in small_sizes(self._task.arguments, self._task.sizes, images=self._images)
        ]
        default = small.pop()
        if not small:
            return [default, {"num_inference_steps": None}]
        return [*small, *(size | {"num_inference_steps": None} for size in small), default]

    def _preview_matches(self, apart: list[torch.Tensor]) -> bool:
        """True if a preview of the last request's last step equals its picture."""
        if self._runs.last_step is None:
            return False
        sample, step = self._runs.last_step
        try:
            drawn = self._runs.alone(lambda: preview(self._task, sample.arguments(), step.prev_sample), sample.seed)
        except SampleFailed as failed:
            log.info("previews are off: the pipeline does not run with a denoiser of zeros (%r)", failed.error)
            return False
        return self._same([*apart[:-1], drawn.float().cpu()], apart)

    def _outputs(self, run: SampleRun) -> list[torch.Tensor]:
        with Fork(self._task.pipeline) as pipeline:
            return outputs(pipeline(**run.arguments()))

    def _same(self, one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        """True if the pictures are bitwise equal; on a GPU also if they differ no more than equal runs apart do.

        Kernels there may add up in any order (atomics), or be chosen by the free memory.
        """
        if _equal(one, other):
            return True
        if self._model.device.type != "cuda" or not _alike(one, other):
            return False
        return _largest_difference(one, other) <= SPREADS * self._measured_spread()

    def _measured_spread(self) -> float:
        """The largest difference between two runs apart; 0 if it is so large that it shows nothing."""
        if self._spread is None:
            first, second = (self._runs.attempt(self._runs.batcher("serial")) for _ in range(2))
            measured = _largest_difference(first, second) if first and self._is_close(first, second) else 0.0
            self._spread = measured
            if measured:
                log.warning("equal requests differ by up to %.2g on this device", measured)
        return self._spread

    def _why_serial(self, apart: list[torch.Tensor]) -> str:
        if self._same(apart, self._runs.attempt(self._runs.batcher("serial"))):
            return "it keeps a request's state in objects that requests share"
        return "its pictures are not determined by the request's seed, so nothing can be compared"

    def _together(self, apart: list[torch.Tensor]) -> BatchingDecision:
        """Merge every call; if the pictures then differ, try again without one kind of call at a time."""
        batcher = self._runs.batcher("merged")
        if self._is_close(apart, self._runs.attempt(batcher)):
            return _merged(batcher)
        for name in sorted(batcher.recovery.merged_names):
            batcher = self._runs.batcher("merged")
            batcher.policy.unmergeable[name] = "merged, it changes the picture"
            if self._is_close(apart, self._runs.attempt(batcher)):
                return _merged(batcher)
        reason = "its calls cannot be merged: requests together differ from the same ones apart"
        return BatchingDecision("interleaved", reason)

    def _is_close(self, apart: list[torch.Tensor], together: list[torch.Tensor]) -> bool:
        if not _alike(apart, together):
            return False
        if self._model.dtype is torch.float32 and self._model.device.type == "cpu":  # cuDNN computes in TF32
            return all((a - b).abs().max().item() <= FP32_TOLERANCE for a, b in zip(apart, together, strict=True))
        scale = (apart[0] - apart[1]).abs().mean().item() if apart[0].shape == apart[1].shape else 1.0
        worst = max((a - b).abs().mean().item() for a, b in zip(apart, together, strict=True))
        return worst <= LOW_PRECISION_SHARE * scale


def _has_channels_first(picture: torch.Tensor) -> bool:
    """True for [C, H, W] and [F, C, H, W]; some pipelines return tensors (though not arrays) of other shapes."""
    return picture.ndim in (3, 4) and picture.shape[-3] in (1, 3, 4)


def _merged(batcher: Batcher) -> BatchingDecision:
    if not batcher.recovery.merged_names:
        why = "; ".join(f"{name}: {reason}" for name, reason in sorted(batcher.policy.unmergeable.items()))
        return BatchingDecision("interleaved", why or "no two calls were alike enough to meet")
    counters = batcher.runner.counters
    reason = f"three small requests took {counters.forwards} forwards for {counters.calls} calls"
    alone = "".join(f"; {name} runs alone: {why}" for name, why in sorted(batcher.policy.unmergeable.items()))
    return BatchingDecision("merged", reason + alone, dict(batcher.policy.unmergeable))


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _alike(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return [picture.shape for picture in one] == [picture.shape for picture in other]


def _largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(((a - b).abs().max().item() for a, b in zip(one, other, strict=True)), default=0.0)
