"""One pipeline class: built, saved, loaded, tested, served, and compared with plain diffusers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers import DiffusionPipeline

from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.protocol.generation import Generate
from safelight.protocol.self_test import SelfTestResult
from safelight.worker.model.model import Model, load_model
from safelight.worker.model.pipeline_task import PipelineTask
from safelight.worker.requests.sample import SampleRun
from safelight.worker.self_test.self_test import SelfTest

from .asking import PROMPTS, directly, request
from .build import build
from .row import Row, Stage
from .service import Service
from .two_ranks import made_plainly, parallel


class Examination:
    """Fills ``row``, whose stage says where it stands when something is raised. ``scratch`` is for the checkpoint.

    ``note`` hears whenever a stage begins: how many seconds a call of plain diffusers took, or 0 before that is known.
    """

    def __init__(self, row: Row, scratch: Path, note: Callable[[float], object]) -> None:
        self._row = row
        self._plain_s = 0.0
        self._note = note
        self._config = Config(model=str(scratch / row.pipeline), device="cpu")

    def run(self) -> None:
        """Go through all stages."""
        build(self._row.pipeline).save_pretrained(self._config.model)
        self._enter("load")
        model = load_model(self._config)
        plain = DiffusionPipeline.from_pretrained(self._config.model)
        plain.set_progress_bar_config(disable=True)
        plain_error = self._run_plainly(plain)
        self_test = self._tested(model, plain_error)
        task = self._task(model)
        requests = [request(task, self._row.pipeline, index) for index in range(len(PROMPTS))]
        self._enter("diffusers")
        expected = [made_plainly(plain, _arguments(model, asked)) for asked in requests]
        if not all(made.isfinite().all() for made in expected):
            raise ValueError("what it makes is not finite (NaN or infinity)")
        self._enter("serve")
        self._row.mode = task.batching.mode
        self._row.reason = task.batching.reason
        self._serve(Service(model, self_test, self._config), requests, expected)
        self._enter("done")
        self._row.parallel = parallel(plain, self._config.model, _arguments(model, requests[0]), expected[0])

    def _enter(self, stage: Stage) -> None:
        self._row.stage = stage
        self._note(self._plain_s)

    def _run_plainly(self, plain: DiffusionPipeline) -> Exception | None:
        """The exception of plain diffusers, if any, for arguments that fit most pipelines."""
        started = time.perf_counter()
        try:
            plain(**directly(plain, self._row.pipeline))
        except Exception as error:  # noqa: BLE001  # it counts only where the self-test finds nothing either
            return error
        finally:
            self._plain_s = time.perf_counter() - started
        return None

    def _tested(self, model: Model, plain_error: Exception | None) -> SelfTestResult:
        """The self-test's findings. Where it finds nothing, plain diffusers has shown whose fault that is."""
        self._enter("serve")
        try:
            return SelfTest(model, self._config).run()
        except StartFailed:
            if plain_error is not None:
                self._enter("diffusers")
                raise plain_error from None
            raise

    def _task(self, model: Model) -> PipelineTask:
        task = model.image if self._row.kind.startswith("image") else model.text
        if task is None:
            raise StartFailed(model.no_image if self._row.kind.startswith("image") else "it needs an image")
        return task

    def _serve(self, service: Service, requests: list[Generate], expected: list[torch.Tensor]) -> None:
        try:
            file = msgspec.structs.replace(requests[0], output_format="mp4" if expected[0].ndim == 4 else "png")
            self._row.served = len(service.files([file])[0]) > 0
            exact = [msgspec.structs.replace(asked, deterministic=True) for asked in requests]
            self._row.bitwise = _worst(service.tensors(exact), expected) == 0.0
            if self._row.mode == "merged":
                service.counted()
                self._row.worst = _worst(service.tensors(requests), expected)
            counted = service.counted()
            self._row.calls, self._row.forwards = counted.calls, counted.forwards
        finally:
            service.close()


def _arguments(model: Model, asked: Generate) -> dict[str, Any]:
    """The arguments with which a worker calls the pipeline."""
    return SampleRun(model, asked, 0, lambda *_: None, lambda _: None).arguments()


def _worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of a pixel; 1 where shapes differ."""
    pairs = list(zip(found, expected, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return 1.0
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max())  # NaN, if any is
