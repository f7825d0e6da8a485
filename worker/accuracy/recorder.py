"""Records realistic inputs for every component: the pipeline's own calls, at the boundary.

Small requests run on plain, unchanged components. So no component needs handwritten inputs, and a new pipeline has them
on the day of its release.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from PIL import Image as pillow
from torch.utils import _pytree as pytree

from ...protocol.codec import Buffer
from ...protocol.errors import StartFailed
from ...protocol.generation import Generate, Image, Sample
from ..crossing.chain import Interceptor
from ..crossing.interceptors import Recorder
from ..forward.batcher import Batcher
from ..forward.resources import ForwardResources
from ..model.model import Model
from ..model.pipeline_task import PipelineTask
from ..pipelines.image_variants import takes_image
from ..pipelines.sizes import small_sizes
from ..requests.sample import SampleRun
from .recorded import Recorded, keep

PROMPTS = (
    'two small blue squares and a star on a white table, and a sign that says "Safelight"',
    'a road at night; over the last house is written "open"',
    '"7" in green on a door, and a cat that looks at it',
)
"""One prompt per request. Some pipelines have encoders of letters, which receive the words in quotes."""

STEPS = (2, 4, 8)
"""Steps per request: unequal, for many different timesteps; enough to reach a second transformer for the last steps."""


def record(model: Model) -> list[Recorded]:
    """The first and last call of each name in small requests, and an ``encode`` of each VAE's decoded output.

    Raises ``StartFailed`` if no small request runs.
    """
    task = model.main
    if takes_image(type(model.pipeline)):
        model.image = task  # try both tasks, as the self-test does
    error: BaseException | None = None
    for size in small_sizes(task.arguments, task.sizes):
        for images in ([], [_picture()]) if model.image is not None else ([],):
            runs = [_RecordedRun(model, _request(task, index, size, images)) for index in range(len(PROMPTS))]
            error = next((failed for run in runs if (failed := run.go()) is not None), None)
            if error is None:
                return [call for run in runs for call in run.recorded()]
    raise StartFailed(
        f"The pipeline {type(model.pipeline).__name__} makes nothing from a small request "
        f"({type(error).__name__}: {error}), so its components have no inputs to be compared with."
    )


class _RecordedRun(SampleRun):
    """A sample whose calls are recorded."""

    def __init__(self, model: Model, request: Generate) -> None:
        super().__init__(model, request, 0, lambda *_: None, lambda _: None)
        self._calls: dict[str, list[Recorded]] = {}
        self._decoded: dict[str, torch.Tensor] = {}

    def go(self) -> BaseException | None:
        """Run to the end; returns the pipeline's exception, if any."""
        batcher = Batcher(
            max_batch=1, max_tokens=1, mode="serial", resources=ForwardResources(offload=self._model.offload)
        )
        batcher.start(self.coroutine)
        while batcher.busy:
            batcher.step()
        return self.coroutine.error

    def recorded(self) -> list[Recorded]:
        backwards = [
            Recorded(component, "encode", (picture.clamp(-1, 1),), {})
            for component, picture in self._decoded.items()
            if f"{component}.encode" not in self._calls
        ]
        return [call for calls in self._calls.values() for call in calls] + backwards

    def interceptors(self) -> list[Interceptor]:
        return [*super().interceptors(), Recorder(keep, self._keep_answered)]

    def _keep_answered(self, kept: Recorded, answer: Any) -> None:
        self._calls[kept.name] = [*self._calls.get(kept.name, [])[:1], kept]
        if kept.method == "decode" and hasattr(self._model.pipeline.components[kept.owner], "encode"):
            pictures = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
            self._decoded[kept.component] = pictures[0].detach().cpu().clone()


def _request(task: PipelineTask, index: int, size: dict[str, int], images: list[Image]) -> Generate:
    # resolution binning would enlarge the picture to one of the model's own sizes
    extra = {"use_resolution_binning": False} if "use_resolution_binning" in task.arguments else {}
    request = Generate(
        request_id=f"verify-{index}",
        samples=[Sample(PROMPTS[index], seed=index)],
        images=images,
        num_inference_steps=STEPS[index] if "num_inference_steps" in task.arguments else None,
        extra=extra,
    )
    return msgspec.structs.replace(request, **size)


def _picture() -> Image:
    drawn = pillow.linear_gradient("L").resize((64, 64)).convert("RGB")
    return Image(drawn.width, drawn.height, Buffer(drawn.tobytes()))
