"""What a pipeline allows: the same small requests apart, interleaved and together.

Apart is what plain diffusers would do. Interleaved, they take turns at every call to a component; a pipeline that
keeps a request's state inside a shared object shows it here. Together, their calls meet in merged forwards.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import torch
from PIL import Image as pillow

from ..protocol.codec import Buffer
from ..protocol.config import Config
from ..protocol.generation import Generate, Image, Sample
from ..protocol.replicas import BatchingMode
from .batcher import Batcher
from .crossing.changes import untraced
from .crossing.coroutine import Coroutine
from .crossing.fork import Fork
from .crossing.random_state import seeded
from .forward.at_rest import AtRest
from .forward.recovery import Agree
from .model import Model, modules
from .preview import preview
from .sample import SampleRun, outputs
from .sizes import SMALLEST, small_sizes
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

_EXTRA = {"use_resolution_binning": False, "strength": 0.75, "attn_res": None}
"""Binning would enlarge the small size to one of the model's own, and little strength leave none of so few steps.

Attention is looked at where a small picture has it, which is not where a large one does.
"""


_NEEDED: tuple[dict[str, Any], ...] = (
    {},
    {"negative_prompt": "blurry"},
    {"control_mode": 0},
    {"source_prompt": "a red square"},
    {"token_indices": [1]},
    {"gligen_phrases": ["a red square"], "gligen_boxes": [[0.25, 0.25, 0.75, 0.75]]},
)
"""Arguments without which some pipelines do not run, although their signatures have defaults for them."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a task's requests share forwards. ``unmergeable`` are the calls that must run alone, and why."""

    mode: BatchingMode
    reason: str
    unmergeable: dict[str, str] = field(default_factory=dict)


class DoesNotRun(Exception):
    """A task's pipeline raises whatever is tried; the message says what the last try raised."""


class Trial:
    """Runs the small requests for the model's task with images, or for the one without.

    ``report`` hears of stages; ``agree`` is asked after a forward that failed, as in serving.
    """

    def __init__(
        self, model: Model, config: Config, report: Callable[[str], None], agree: Agree, *, images: bool
    ) -> None:
        task = model.image if images else model.text
        assert task is not None, "the task that is tried"
        self._model = model
        self._task = task
        self._config = config
        self._report = report
        self._agree = agree
        self._images = images
        self._at_rest = AtRest(modules(task.pipeline))
        self._size: dict[str, int | None] = {}
        self._needed: dict[str, Any] = {}
        self._last: tuple[SampleRun, Step] | None = None
        self._first = torch.empty(0)

    def judge(self) -> Verdict:
        """Decide how requests share forwards, and set what the task depends on. Raises ``DoesNotRun``."""
        self._say("apart")
        apart = self._first_runs()
        self._first = apart[0]
        self._task.supports_preview = self._preview_matches(apart[-1])
        if self._config.batching == "serial":
            return Verdict("serial", "chosen by --batching")
        self._say("interleaved")
        with untraced(modules(self._task.pipeline).values()):
            interleaved = self._attempt(self._batcher("interleaved"))
        if not _same(apart, interleaved):
            return Verdict("serial", self._why_serial(apart))
        if self._config.batching == "interleaved":
            return Verdict("interleaved", "chosen by --batching")
        self._say("together")
        return self._together(apart)

    def run_once(self) -> None:
        """Run one small request of the size that the task is known to run at. Raises ``DoesNotRun``."""
        self._report("self-test: one request, as another replica has done the rest")
        self._size = self._task.tried_size
        required = {name for name, parameter in self._task.arguments.items() if parameter.is_required}
        self._needed = next(needed for needed in _NEEDED if needed.keys() == required)
        try:
            self._pictures(self._batcher("serial"), (0,))
        except _SampleFailed as failed:
            log.info("the pipeline does not run", exc_info=failed.error)
            raise DoesNotRun(str(failed)) from None

    def _say(self, stage: str) -> None:
        self._report(f"self-test{' with images' if self._images else ''}: requests {stage}")

    def _together(self, apart: list[torch.Tensor]) -> Verdict:
        batcher = self._batcher("merged")
        if self._close(apart, self._attempt(batcher)):
            return _merged_verdict(batcher)
        for name in sorted(batcher.recovery.merged_names):
            batcher = self._batcher("merged")
            batcher.policy.unmergeable[name] = "merged, it changes the picture"
            if self._close(apart, self._attempt(batcher)):
                return _merged_verdict(batcher)
        reason = "its calls cannot be merged: requests together differ from the same ones apart"
        return Verdict("interleaved", reason)

    def _why_serial(self, apart: list[torch.Tensor]) -> str:
        if _same(apart, self._attempt(self._batcher("serial"))):
            return "it keeps a request's state in objects that requests share"
        return "its pictures are not determined by the request's seed, so nothing can be compared"

    def _attempt(self, batcher: Batcher) -> list[torch.Tensor]:
        """The pictures on ``batcher``; none when the pipeline does not survive this way of running."""
        try:
            return self._pictures(batcher)
        except _SampleFailed as failed:
            log.info("a request of the self-test failed", exc_info=failed.error)
            return []

    def _batcher(self, mode: BatchingMode) -> Batcher:
        return Batcher(
            max_batch=self._config.max_batch,
            max_tokens=self._config.max_batch_tokens,
            mode=mode,
            costs=self._model.costs,
            at_rest=self._at_rest,
            agree=self._agree,
        )

    def _first_runs(self) -> list[torch.Tensor]:
        """The pictures apart, at the smallest size and in the output type with which the pipeline runs.

        Arguments that it does not run without become required ones.
        """
        errors: list[BaseException] = []
        possible = [needed for needed in _NEEDED if needed.keys() <= self._task.arguments.keys()]
        for output_type in self._output_types():
            self._task.output_type = output_type
            for size, needed in itertools.product(self._sizes(), possible):
                self._size, self._needed = size, needed
                try:
                    pictures = self._apart("serial")
                except _SampleFailed as failed:
                    errors.append(failed.error)
                    continue
                if not all(_has_channels_first(picture) for picture in pictures):
                    errors.append(ValueError(f"its {output_type!r} output has the shape {tuple(pictures[0].shape)}"))
                    break  # as it would have at any size
                self._task.tried_size = size
                self._task.require(self._needed.keys())
                return pictures
        log.info("the pipeline does not run", exc_info=errors[-1])
        raise DoesNotRun(f"{type(errors[-1]).__name__}: {errors[-1]}")

    def _output_types(self) -> tuple[Literal["pt", "np"], ...]:
        if self._images and self._model.text is not None:
            return (self._model.text.output_type,)
        return ("pt", "np")

    def _sizes(self) -> list[dict[str, int | None]]:
        """Sizes to try, from small to the pipeline's default. With images, the one that ran without.

        Before the default, which may be large, come the small ones with the pipeline's own number of steps: some have
        other defaults that go with no other number (a guidance for each step).
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

    def _apart(self, mode: BatchingMode) -> list[torch.Tensor]:
        return [self._pictures(self._batcher(mode), (index,))[0] for index in range(len(_PROMPTS))]

    def _pictures(self, batcher: Batcher, indices: Sequence[int] = range(len(_PROMPTS))) -> list[torch.Tensor]:
        """Run the small requests ``indices`` on ``batcher``. Raises ``_SampleFailed`` with what one of them raised."""
        watches_all = batcher.mode == "serial"
        runs = [
            SampleRun(self._model, self._request(index), 0, self._remember, lambda _: None, watches_all=watches_all)
            for index in indices
        ]
        for run in runs:
            batcher.start(run.coroutine)
        while batcher.busy:
            batcher.step()
        for run in runs:
            if run.coroutine.error is not None:
                raise _SampleFailed(run.coroutine.error)
        return [run.coroutine.result.float().cpu() for run in runs]

    def _request(self, index: int) -> Generate:
        takes = self._task.arguments
        request = Generate(
            request_id=f"self-test-{index}",
            samples=[Sample(_PROMPTS[index], seed=index)],
            num_inference_steps=_STEPS[index] if "num_inference_steps" in takes else None,
            extra={name: value for name, value in _EXTRA.items() if name in takes},
        )
        fields = {name: value for name, value in self._needed.items() if name in request.__struct_fields__}
        extra = {name: value for name, value in self._needed.items() if name not in fields}
        images = [self._image(index + place) for place in range(len(self._task.image_arguments) if self._images else 0)]
        return msgspec.structs.replace(request, images=images, extra=request.extra | extra, **fields, **self._size)

    def _image(self, seed: int) -> Image:
        """A picture of coarse noise, as large as what is to be made from it."""
        side = SMALLEST * self._task.sizes.multiple
        width, height = self._size.get("width") or side, self._size.get("height") or side
        coarse = torch.randint(256, (4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        picture = pillow.fromarray(coarse.numpy()).resize((width, height), pillow.Resampling.BICUBIC)
        return Image(width, height, Buffer(picture.tobytes()))

    def _remember(self, sample: SampleRun, step: Step) -> None:
        self._last = (sample, step)

    def _preview_matches(self, picture: torch.Tensor) -> bool:
        """Whether a preview of the last request's last step is its picture."""
        if self._last is None:
            return False
        sample, latents = self._last[0], self._last[1].prev_sample
        try:
            seen = self._alone(lambda: preview(self._task, sample.arguments(), latents), sample.seed)
        except _SampleFailed as failed:
            log.info("previews are off: the pipeline does not run with a denoiser of zeros (%r)", failed.error)
            return False
        return torch.equal(seen.float().cpu(), picture)

    def takes_several_images(self) -> bool:
        """Whether two images make one output, and not that of the first alone, which :meth:`judge` has made."""
        both = msgspec.structs.replace(self._request(0), images=[self._image(0), self._image(1)])
        run = SampleRun(self._model, both, 0, lambda *_: None, lambda _: None)
        self._task.several_images = True
        try:
            made = self._alone(lambda: self._outputs(run), run.seed)
        except _SampleFailed as failed:
            log.info("two images do not make one output (%r)", failed.error)
            return False
        finally:
            self._task.several_images = False
        if len(made) != 1:
            return False
        return made[0].shape != self._first.shape or bool(
            (made[0].float().cpu() - self._first).abs().max() > FP32_TOLERANCE
        )

    def _outputs(self, run: SampleRun) -> list[torch.Tensor]:
        with Fork(self._task.pipeline) as pipeline:
            return outputs(pipeline(**run.arguments()))

    def _alone(self, function: Callable[[], Any], seed: int) -> Any:
        """What ``function`` returns as the only coroutine, of a sample with ``seed``. Raises ``_SampleFailed``."""
        batcher = self._batcher("interleaved")
        coroutine = Coroutine(function, lambda _: None, random=seeded(seed))
        batcher.start(coroutine)
        while batcher.busy:
            batcher.step()
        if coroutine.error is not None:
            raise _SampleFailed(coroutine.error)
        return coroutine.result

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


def _has_channels_first(picture: torch.Tensor) -> bool:
    """Whether it is [C, H, W] or [F, C, H, W], as some pipelines' tensors are not (but their arrays are in order)."""
    return picture.ndim in (3, 4) and picture.shape[-3] in (1, 3, 4)


def _merged_verdict(batcher: Batcher) -> Verdict:
    if not batcher.recovery.merged_names:
        why = "; ".join(f"{name}: {reason}" for name, reason in sorted(batcher.policy.unmergeable.items()))
        return Verdict("interleaved", why or "no two calls were alike enough to meet")
    counters = batcher.runner.counters
    reason = f"three small requests took {counters.forwards} forwards for {counters.calls} calls"
    alone = "".join(f"; {name} runs alone: {why}" for name, why in sorted(batcher.policy.unmergeable.items()))
    return Verdict("merged", reason + alone, dict(batcher.policy.unmergeable))


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
