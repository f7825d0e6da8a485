"""What a model does and how, found out at load by doing it: from a prompt alone, and from an image."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from ..protocol.config import Config
from ..protocol.errors import StartFailed
from ..protocol.replicas import Batching, BatchingMode
from ..protocol.self_test import SelfTestResult, TaskResult
from .crossing.changes import untraced
from .forward.recovery import Agree
from .image_variants import IncompatibleComponents, image_variants, needs_image, share_components
from .model import Model, modules
from .pipeline_task import PipelineTask, new_task
from .probe import DoesNotRun, Trial, Verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """The batcher's mode, which leaves each task its own; ``unmergeable`` are calls that must run alone, and why."""

    mode: BatchingMode
    unmergeable: dict[str, str]


class SelfTest:
    """Runs small requests on ``model``, and sets what it does.

    ``report`` hears of each stage; ``agree`` is that of the batcher, for forwards that fail on several ranks.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        report: Callable[[str], None] = lambda _: None,
        agree: Agree = lambda _: None,
    ) -> None:
        self._model = model
        self._config = config
        self._report = report
        self._agree = agree
        self._no_text = ""

    def run(self) -> Found:
        """Raises ``StartFailed`` when the pipeline does not run at all."""
        components = modules(self._model.pipeline).values()
        with untraced(components):
            text = self._text()
        with untraced(components):
            image = self._image()
        verdicts = [verdict for verdict in (text, image) if verdict is not None]
        if not verdicts:
            raise StartFailed(
                f"The pipeline {type(self._model.pipeline).__name__} was loaded but makes nothing from a prompt "
                f"({self._no_text}), and nothing from an image ({self._model.no_image})."
            )
        return _together(verdicts)

    def result(self, found: Found) -> SelfTestResult:
        """What :meth:`run` has found out, for :meth:`recall`."""
        model = self._model
        return SelfTestResult(
            mode=found.mode,
            unmergeable=found.unmergeable,
            text=_task_result(model.text),
            image=_task_result(model.image),
            no_image=model.no_image,
        )

    def recall(self, result: SelfTestResult) -> Found:
        """Set what another replica of the same server has found out, after one request that shows that the model runs.

        Raises ``StartFailed`` when it does not.
        """
        model = self._model
        if result.image is not None:
            cls = next(cls for cls in image_variants(type(model.pipeline)) if cls.__name__ == result.image.pipeline)
            model.image = new_task(share_components(cls, model.pipeline), self._config, model.model_defaults.defaults)
            _recall(model.image, result.image)
        if result.text is not None:
            assert model.text is not None
            _recall(model.text, result.text)
        else:
            model.text = None
        model.no_image = result.no_image
        try:
            with untraced(modules(model.pipeline).values()):
                self._trial(images=model.text is None).run_once()
        except DoesNotRun as error:
            raise StartFailed(
                f"The pipeline {type(model.pipeline).__name__} ran before and does not now ({error})."
            ) from None
        return Found(result.mode, result.unmergeable)

    def _trial(self, *, images: bool) -> Trial:
        return Trial(self._model, self._config, self._report, self._agree, images=images)

    def _text(self) -> Verdict | None:
        assert self._model.text is not None
        try:
            if needs_image(type(self._model.pipeline)):
                raise DoesNotRun("it needs an image")
            verdict = self._trial(images=False).judge()
        except DoesNotRun as error:
            self._no_text = str(error)
            self._model.text = None
            return None
        self._model.text.batching = Batching(verdict.mode, verdict.reason)
        return verdict

    def _image(self) -> Verdict | None:
        self._model.no_image = "diffusers has no pipeline for images on its components"
        for cls in image_variants(type(self._model.pipeline)):
            try:
                return self._try_images(share_components(cls, self._model.pipeline))
            except IncompatibleComponents as error:
                self._model.no_image = str(error)
            except DoesNotRun as error:
                self._model.no_image = f"{cls.__name__} does not run on its components ({error})"
                self._model.image = None
            log.info("%s", self._model.no_image)
        return None

    def _try_images(self, pipeline: DiffusionPipeline) -> Verdict:
        """Raises ``DoesNotRun``."""
        self._model.image = image = new_task(pipeline, self._config, self._model.model_defaults.defaults, images=True)
        trial = self._trial(images=True)
        verdict = trial.judge()
        image.several_images = len(image.image_arguments) == 1 and trial.takes_several_images()
        image.batching = Batching(verdict.mode, verdict.reason)
        return verdict


def _task_result(task: PipelineTask | None) -> TaskResult | None:
    if task is None:
        return None
    return TaskResult(
        pipeline=type(task.pipeline).__name__,
        output_type=task.output_type,
        several_images=task.several_images,
        supports_preview=task.supports_preview,
        batching=task.batching,
        tried_size=task.tried_size,
        required=[name for name, parameter in task.arguments.items() if parameter.is_required],
    )


def _recall(task: PipelineTask, result: TaskResult) -> None:
    task.require(result.required)
    task.output_type, task.several_images = result.output_type, result.several_images
    task.supports_preview, task.batching, task.tried_size = (
        result.supports_preview,
        result.batching,
        dict(result.tried_size),
    )


def _together(verdicts: list[Verdict]) -> Found:
    """The batcher merges if any task's calls can be; requests of the others keep out of it by themselves."""
    modes = {verdict.mode for verdict in verdicts}
    mode = next(mode for mode in ("merged", "interleaved", "serial") if mode in modes)
    unmergeable = {name: why for verdict in verdicts for name, why in verdict.unmergeable.items()}
    return Found(mode, unmergeable)
