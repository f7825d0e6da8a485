"""The self-test at load: runs small requests to find out a model's tasks, and how requests may share forwards."""

from __future__ import annotations

import logging
from collections.abc import Callable

from diffusers import DiffusionPipeline

from ...protocol.config import Config
from ...protocol.errors import StartFailed
from ...protocol.replicas import Attention, Batching
from ...protocol.self_test import SelfTestResult, TaskResult
from ..crossing.changes import untraced
from ..forward.recovery import Agree
from ..forward.runner import Division
from ..model.attention import AUTO, use_attention
from ..model.model import Model
from ..model.modules import modules
from ..model.pipeline_task import PipelineTask, new_task
from ..pipelines.image_variants import IncompatibleComponents, image_variants, needs_image, share_components
from .probe import BatchingDecision, BatchingProbe, DoesNotRun

log = logging.getLogger(__name__)


class SelfTest:
    """Runs small requests on ``model``, and sets the model's tasks accordingly.

    ``report`` receives the name of each stage; ``agree`` and ``division`` are the batcher's, for several ranks.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        report: Callable[[str], None] = lambda _: None,
        agree: Agree = lambda _: None,
        division: Division | None = None,
    ) -> None:
        self._model = model
        self._config = config
        self._report = report
        self._agree = agree
        self._division = division
        self._no_text = ""
        self._incomplete = False

    def run(self) -> SelfTestResult:
        """Test both tasks, again with plain attention if neither runs. Raises ``StartFailed`` when that fails too."""
        text = self._model.text
        try:
            return self._run()
        except StartFailed as failed:
            if not self._return_to_plain_attention(failed.message):
                raise
        self._model.text, self._incomplete = text, False
        return self._run()

    def _return_to_plain_attention(self, reason: str) -> bool:
        """Undo the choice of ``auto``; false if there is nothing to undo."""
        chosen = self._model.attention
        if self._config.attention_backend != AUTO or chosen is None or chosen.backend == chosen.deterministic:
            return False
        why = f"nothing runs with {chosen.backend}: {reason}"
        self._model.attention = Attention(chosen.deterministic, why, chosen.deterministic)
        use_attention(self._model.attention)
        return True

    def _run(self) -> SelfTestResult:
        model = self._model
        components = modules(model.pipeline).values()
        with untraced(components):
            text = self._test_text()
        with untraced(components):
            image = self._test_image()
        decisions = [decision for decision in (text, image) if decision is not None]
        if not decisions:
            raise StartFailed(
                f"The pipeline {type(model.pipeline).__name__} was loaded but makes nothing from a prompt "
                f"({self._no_text}), and nothing from an image ({model.no_image})."
            )
        modes = {decision.mode for decision in decisions}
        return SelfTestResult(
            # the batcher merges if one task's calls may be merged; requests of the other task keep themselves apart
            mode=next(mode for mode in ("merged", "interleaved", "serial") if mode in modes),
            unmergeable={name: why for decision in decisions for name, why in decision.unmergeable.items()},
            text=_task_result(model.text),
            image=_task_result(model.image),
            no_image=model.no_image,
            incomplete=self._incomplete,
            accuracy={name: one.accuracy for name, one in model.quantized.items() if one.accuracy is not None},
        )

    def apply(self, result: SelfTestResult) -> None:
        """Set the tasks to an earlier ``result`` for the same model, after one request that proves that it runs.

        Raises ``StartFailed`` when it does not run.
        """
        model = self._model
        if result.image is not None:
            classes = image_variants(type(model.pipeline))
            cls = next(cls for cls in classes if cls.__name__ == result.image.pipeline)
            model.image = new_task(share_components(cls, model.pipeline), self._config, model.model_defaults.defaults)
            _apply(result.image, model.image)
        if result.text is not None:
            assert model.text is not None
            _apply(result.text, model.text)
        else:
            model.text = None
        model.no_image = result.no_image
        try:
            with untraced(modules(model.pipeline).values()):
                self._new_probe(images=model.text is None).run_once()
        except DoesNotRun as error:
            raise StartFailed(
                f"The pipeline {type(model.pipeline).__name__} ran before and does not now ({error})."
            ) from None

    def _new_probe(self, *, images: bool) -> BatchingProbe:
        return BatchingProbe(self._model, self._config, self._report, self._agree, self._division, images=images)

    def _test_text(self) -> BatchingDecision | None:
        assert self._model.text is not None
        try:
            if needs_image(type(self._model.pipeline)):
                self._no_text = "it needs an image"
                self._model.text = None
                return None
            decision = self._new_probe(images=False).probe()
        except DoesNotRun as error:
            self._incomplete = True
            self._no_text = str(error)
            self._model.text = None
            return None
        self._model.text.batching = Batching(decision.mode, decision.reason)
        return decision

    def _test_image(self) -> BatchingDecision | None:
        self._model.no_image = "diffusers has no pipeline for images on its components"
        for cls in image_variants(type(self._model.pipeline)):
            try:
                return self._try_images(share_components(cls, self._model.pipeline))
            except IncompatibleComponents as error:
                self._model.no_image = str(error)
            except DoesNotRun as error:
                self._incomplete = True
                self._model.no_image = f"{cls.__name__} does not run on its components ({error})"
                self._model.image = None
            log.info("%s", self._model.no_image)
        return None

    def _try_images(self, pipeline: DiffusionPipeline) -> BatchingDecision:
        """Probe ``pipeline`` as the image task. Raises ``DoesNotRun``."""
        self._model.image = image = new_task(pipeline, self._config, self._model.model_defaults.defaults, images=True)
        probe = self._new_probe(images=True)
        decision = probe.probe()
        image.several_images = len(image.image_arguments) == 1 and probe.takes_several_images()
        image.batching = Batching(decision.mode, decision.reason)
        return decision


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


def _apply(result: TaskResult, task: PipelineTask) -> None:
    task.require(result.required)
    task.output_type = result.output_type
    task.several_images = result.several_images
    task.supports_preview = result.supports_preview
    task.batching = result.batching
    task.tried_size = dict(result.tried_size)
