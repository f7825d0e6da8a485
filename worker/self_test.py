"""What a pipeline allows, found out at load: the same small requests apart, interleaved and together.

Apart is what plain diffusers would do. Interleaved, they take turns at every call to a component; a pipeline that
keeps a request's state inside a shared object shows it here. Together, their calls meet in merged forwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch

from ..protocol.config import Config
from ..protocol.errors import StartFailed
from ..protocol.messages import Batching, BatchingMode, Generate, Sample
from .coroutine import Coroutine
from .hub import Hub
from .model import Model
from .module_state import ModuleState
from .preview import preview
from .sample import SampleRun
from .sizes import small_sizes
from .steps import Step

log = logging.getLogger(__name__)

FP32_TOLERANCE = 1e-4
"""Largest difference of a pixel (in [0, 1]) that merging may make in fp32; seen are about 1e-6."""

LOW_PRECISION_SHARE = 0.05
"""In bf16 and fp16, the mean difference that merging may make, as a share of that between two different requests."""

_PROMPTS = ("a red circle", "two small blue squares and a star on a white table", "a red circle")
"""Of different lengths, and two of the same: some pipelines' calls only meet when their texts are equally long."""

_STEPS = (2, 3, 3)
"""Unequal, so that some still run when another's call has ended and cleaned up after itself."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the self-test found. ``unmergeable`` are the calls that must run alone, and why."""

    batching: Batching
    unmergeable: dict[str, str]
    supports_preview: bool


class SelfTest:
    """Runs the small requests on ``model``. ``report`` hears of each stage."""

    def __init__(self, model: Model, config: Config, report: Callable[[str], None] = lambda _: None) -> None:
        self._model = model
        self._config = config
        self._report = report
        self._size: dict[str, int] = {}
        self._last: tuple[SampleRun, Step] | None = None

    def run(self) -> Verdict:
        """Decide how requests share forwards. Raises ``StartFailed`` when the pipeline does not run at all."""
        pristine = ModuleState(self._model.pipeline)
        verdict = self._judge()
        if verdict.batching.mode == "serial":
            pristine.restore()  # the test itself may have left its traces
            self._model.pristine = pristine
        return verdict

    def _judge(self) -> Verdict:
        self._report("self-test: requests apart")
        apart = self._first_runs()
        supports_preview = self._preview_matches(apart[-1])
        if self._config.batching == "serial":
            return self._serial("chosen by --batching")
        if not _same(apart, self._attempt(self._hub("serial"))):
            return self._serial("its pictures are not determined by the request's seed, so nothing can be compared")
        self._report("self-test: requests interleaved")
        if not _same(apart, self._attempt(self._hub("interleaved"))):
            return self._serial("it keeps a request's state in objects that requests share")
        if self._config.batching == "interleaved":
            return Verdict(Batching("interleaved", "chosen by --batching"), {}, supports_preview)
        self._report("self-test: requests together")
        return self._together(apart, supports_preview)

    def _together(self, apart: list[torch.Tensor], supports_preview: bool) -> Verdict:
        hub = self._hub("merged")
        if self._close(apart, self._attempt(hub)):
            return self._merged_verdict(hub, supports_preview)
        for name in sorted(hub.merged_names):
            hub = self._hub("merged")
            hub.unmergeable[name] = "merged, it changes the picture"
            if self._close(apart, self._attempt(hub)):
                return self._merged_verdict(hub, supports_preview)
        reason = "its calls cannot be merged: requests together differ from the same ones apart"
        return Verdict(Batching("interleaved", reason), {}, supports_preview)

    def _attempt(self, hub: Hub) -> list[torch.Tensor]:
        """The pictures on ``hub``; none when the pipeline does not survive this way of running."""
        try:
            return self._pictures(hub)
        except _SampleFailed as failed:
            log.info("a request of the self-test failed", exc_info=failed.error)
            return []

    def _merged_verdict(self, hub: Hub, supports_preview: bool) -> Verdict:
        if hub.counters.forwards == hub.counters.calls:
            why = "; ".join(f"{name}: {reason}" for name, reason in sorted(hub.unmergeable.items()))
            return Verdict(
                Batching("interleaved", why or "no two calls were alike enough to meet"), {}, supports_preview
            )
        reason = f"three small requests took {hub.counters.forwards} forwards for {hub.counters.calls} calls"
        alone = "".join(f"; {name} runs alone: {why}" for name, why in sorted(hub.unmergeable.items()))
        return Verdict(Batching("merged", reason + alone), dict(hub.unmergeable), supports_preview)

    def _serial(self, reason: str) -> Verdict:
        return Verdict(Batching("serial", reason), {}, False)

    def _hub(self, mode: BatchingMode) -> Hub:
        return Hub(max_batch=self._config.max_batch, max_tokens=self._config.max_batch_tokens, mode=mode)

    def _first_runs(self) -> list[torch.Tensor]:
        """The pictures apart, at the smallest size and in the output type with which the pipeline runs."""
        errors: list[BaseException] = []
        output_types: tuple[Literal["pt", "np"], ...] = ("pt", "np")
        for output_type in output_types:
            self._model.output_type = output_type
            for size in small_sizes(self._model.arguments, self._model.sizes):
                self._size = size
                try:
                    return self._apart("serial")
                except _SampleFailed as failed:
                    errors.append(failed.error)
        log.error("the pipeline does not run", exc_info=errors[-1])
        raise StartFailed(
            f"The pipeline {type(self._model.pipeline).__name__} was loaded but cannot make a picture from a prompt "
            f"alone ({type(errors[-1]).__name__}: {errors[-1]})."
        )

    def _apart(self, mode: BatchingMode) -> list[torch.Tensor]:
        return [self._pictures(self._hub(mode), (index,))[0] for index in range(len(_PROMPTS))]

    def _pictures(self, hub: Hub, indices: Sequence[int] = range(len(_PROMPTS))) -> list[torch.Tensor]:
        """Run the small requests ``indices`` on ``hub``. Raises ``_SampleFailed`` with what one of them raised."""
        runs = [SampleRun(self._model, self._request(index), 0, self._remember, lambda _: None) for index in indices]
        for run in runs:
            hub.start(run.coroutine)
        while hub.busy:
            hub.turn()
        for run in runs:
            if run.coroutine.error is not None:
                raise _SampleFailed(run.coroutine.error)
        return [run.coroutine.result.float().cpu() for run in runs]

    def _request(self, index: int) -> Generate:
        takes = self._model.arguments
        request = Generate(
            request_id=f"self-test-{index}",
            samples=[Sample(_PROMPTS[index], seed=index)],
            num_inference_steps=_STEPS[index] if "num_inference_steps" in takes else None,
            # binning would enlarge the small size to one of the model's own
            extra={"use_resolution_binning": False} if "use_resolution_binning" in takes else {},
        )
        return msgspec.structs.replace(request, **self._size)

    def _remember(self, sample: SampleRun, step: Step) -> None:
        self._last = (sample, step)

    def _preview_matches(self, picture: torch.Tensor) -> bool:
        """Whether a preview of the last request's last step is its picture."""
        if self._last is None:
            return False
        sample, latents = self._last[0], self._last[1].prev_sample
        hub = self._hub("interleaved")
        coroutine = Coroutine(lambda: preview(self._model, sample.arguments(), latents), lambda _: None)
        hub.start(coroutine)
        while hub.busy:
            hub.turn()
        if coroutine.error is not None:
            log.info("previews are off: the pipeline does not run with a denoiser of zeros (%r)", coroutine.error)
            return False
        return torch.equal(coroutine.result.float().cpu(), picture)

    def _close(self, apart: list[torch.Tensor], together: list[torch.Tensor]) -> bool:
        if len(apart) != len(together):
            return False
        if self._model.dtype is torch.float32:
            return all((a - b).abs().max().item() <= FP32_TOLERANCE for a, b in zip(apart, together, strict=True))
        scale = (apart[0] - apart[1]).abs().mean().item() if apart[0].shape == apart[1].shape else 1.0
        worst = max((a - b).abs().mean().item() for a, b in zip(apart, together, strict=True))
        return worst <= LOW_PRECISION_SHARE * scale


class _SampleFailed(Exception):
    def __init__(self, error: BaseException) -> None:
        super().__init__(repr(error))
        self.error = error


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
