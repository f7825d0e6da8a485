"""The small requests of the self-test, and the batchers that run them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from PIL import Image as pillow

from ...protocol.codec import Buffer
from ...protocol.config import Config
from ...protocol.generation import Generate, Image, Sample
from ...protocol.replicas import BatchingMode
from ..crossing.coroutine import Coroutine
from ..crossing.random_state import seeded
from ..crossing.steps import DenoisingStep
from ..forward.at_rest import AtRest
from ..forward.batcher import Batcher
from ..forward.recovery import Agree
from ..forward.resources import ForwardResources
from ..forward.runner import Division
from ..model.model import Model
from ..model.modules import modules
from ..model.pipeline_task import PipelineTask
from ..pipelines.sizes import SMALLEST
from ..requests.sample import SampleRun

log = logging.getLogger(__name__)

PROMPTS = ("a red circle", "two small blue squares and a star on a white table", "a red circle")
"""Two are equal, one is longer: in some pipelines only texts of equal length meet."""

_STEPS = (2, 3, 3)
"""Unequal, so that some requests still run after another one has ended and cleaned up after itself."""

_EXTRA = {"use_resolution_binning": False, "strength": 0.75, "attn_res": None}
"""Values that suit a small picture of few steps.

Resolution binning would enlarge the picture to one of the model's own sizes, a low strength would skip every step, and
the attention maps of a small picture have other resolutions than those of a large one.
"""


class SampleFailed(Exception):
    """A request of the self-test raised ``error``."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(repr(error))
        self.error = error


class ProbeRuns:
    """Runs small requests of ``task`` at the current ``size`` and with the arguments ``required``.

    ``agree`` and ``division`` are the batcher's, for several ranks.
    """

    def __init__(
        self,
        model: Model,
        task: PipelineTask,
        config: Config,
        agree: Agree,
        division: Division | None,
        *,
        images: bool,
    ) -> None:
        self.size: dict[str, int | None] = {}
        self.required: dict[str, Any] = {}
        self.last_step: tuple[SampleRun, DenoisingStep] | None = None
        self._model = model
        self._task = task
        self._config = config
        self._agree = agree
        self._images = images
        self._division = division
        self._at_rest = AtRest(modules(task.pipeline))

    def batcher(self, mode: BatchingMode) -> Batcher:
        return Batcher(
            max_batch=self._config.max_batch,
            max_tokens=self._config.max_positions,
            mode=mode,
            agree=self._agree,
            resources=ForwardResources(
                timing=self._model.timing,
                at_rest=self._at_rest,
                offload=self._model.offload,
                division=self._division,
            ),
        )

    def apart(self) -> list[torch.Tensor]:
        """The picture of each request, run alone. Raises ``SampleFailed``."""
        return [self.pictures(self.batcher("serial"), (index,))[0] for index in range(len(PROMPTS))]

    def attempt(self, batcher: Batcher) -> list[torch.Tensor]:
        """The pictures of all requests on ``batcher``, or an empty list when one of them failed."""
        try:
            return self.pictures(batcher)
        except SampleFailed as failed:
            log.info("a request of the self-test failed", exc_info=failed.error)
            return []

    def pictures(self, batcher: Batcher, indices: Sequence[int] = range(len(PROMPTS))) -> list[torch.Tensor]:
        """The pictures of the requests ``indices``, run at the same time on ``batcher``, in fp32 on the CPU.

        Raises ``SampleFailed`` with the first request's error.
        """
        watches_all = batcher.mode == "serial"
        runs = [
            SampleRun(self._model, self.request(index), 0, self._remember, lambda _: None, watches_all=watches_all)
            for index in indices
        ]
        _run_all(batcher, [run.coroutine for run in runs])
        return [run.coroutine.result.float().cpu() for run in runs]

    def alone(self, function: Callable[[], Any], seed: int) -> Any:
        """Return ``function()``, run as the only coroutine with random state ``seed``. Raises ``SampleFailed``."""
        coroutine = Coroutine(function, lambda _: None, random=seeded(seed))
        _run_all(self.batcher("interleaved"), [coroutine])
        return coroutine.result

    def request(self, index: int) -> Generate:
        """The small request ``index`` of :data:`PROMPTS`, which is its seed too."""
        takes = self._task.arguments
        request = Generate(
            request_id=f"self-test-{index}",
            samples=[Sample(PROMPTS[index], seed=index)],
            num_inference_steps=_STEPS[index] if "num_inference_steps" in takes else None,
            extra={name: value for name, value in _EXTRA.items() if name in takes},
        )
        fields = {name: value for name, value in self.required.items() if name in request.__struct_fields__}
        extra = {name: value for name, value in self.required.items() if name not in fields}
        images = [self.image(index + number) for number in range(len(self._task.image_arguments) * self._images)]
        return msgspec.structs.replace(request, images=images, extra=request.extra | extra, **fields, **self.size)

    def image(self, seed: int) -> Image:
        """An input picture of coarse noise, of the output's size."""
        side = SMALLEST * self._task.sizes.multiple
        width, height = self.size.get("width") or side, self.size.get("height") or side
        coarse = torch.randint(256, (4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        picture = pillow.fromarray(coarse.numpy()).resize((width, height), pillow.Resampling.BICUBIC)
        return Image(width, height, Buffer(picture.tobytes()))

    def _remember(self, sample: SampleRun, step: DenoisingStep) -> None:
        self.last_step = (sample, step)


def _run_all(batcher: Batcher, coroutines: Sequence[Coroutine]) -> None:
    for coroutine in coroutines:
        batcher.start(coroutine)
    while batcher.busy:
        batcher.step()
    for coroutine in coroutines:
        if coroutine.error is not None:
            raise SampleFailed(coroutine.error)
