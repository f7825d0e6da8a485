"""One pipeline class: built, saved, loaded, tested, served, and compared with plain diffusers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers import DiffusionPipeline

from safelight.protocol.config import Config
from safelight.protocol.messages import Generate, Sample
from safelight.worker.hub import Counters
from safelight.worker.model import Model, load_model
from safelight.worker.sample import SampleRun, first_output
from safelight.worker.self_test import SelfTest

from .build import build, particulars
from .row import Row
from .service import Service
from .two_ranks import parallel

log = logging.getLogger(__name__)

PROMPTS = ("a red circle", "two small blue squares and a star on a white table", "a cat on the moon")
SIDES = {"image": 64, "video": 32}
FRAMES = 9


class Examination:
    """Fills ``row``, whose stage says where it stands when something is raised. ``scratch`` is for the checkpoint."""

    def __init__(self, row: Row, scratch: Path) -> None:
        self._row = row
        self._config = Config(model=str(scratch / row.pipeline), device="cpu")

    def run(self) -> None:
        """Go through all stages."""
        build(self._row.pipeline).save_pretrained(self._config.model)
        self._row.stage = "diffusers"
        plain = DiffusionPipeline.from_pretrained(self._config.model)
        plain.set_progress_bar_config(disable=True)
        self._row.stage = "load"
        model = load_model(self._config)
        requests = [_request(model, self._row.pipeline, index) for index in range(len(PROMPTS))]
        self._row.stage = "diffusers"
        expected = [_called(plain, model, request) for request in requests]
        self._row.stage = "serve"
        self._serve(model, requests, expected)
        self._row.stage = "done"
        self._row.parallel = parallel(plain, self._config.model, requests[0], expected[0])

    def _serve(self, model: Model, requests: list[Generate], expected: list[torch.Tensor]) -> None:
        verdict = SelfTest(model, self._config).run()
        self._row.mode, self._row.reason = verdict.batching.mode, verdict.batching.reason
        service = Service(model, verdict, self._config)
        try:
            picture = msgspec.structs.replace(requests[0], output_format="mp4" if expected[0].ndim == 4 else "png")
            self._row.served = len(service.files([picture])[0]) > 0
            exact = [msgspec.structs.replace(request, deterministic=True) for request in requests]
            self._row.bitwise = _worst(service.tensors(exact), expected) == 0.0
            if verdict.batching.mode == "merged":
                service.counted()
                self._row.worst = _worst(service.tensors(requests), expected)
            self._note(service.counted())
        finally:
            service.close()

    def _note(self, counted: Counters) -> None:
        self._row.calls, self._row.forwards = counted.calls, counted.forwards


def _request(model: Model, pipeline: str, index: int) -> Generate:
    """Request ``index`` of three: prompts, seeds and steps differ."""
    takes, call = model.arguments, dict(particulars(pipeline).call)
    side = -(-SIDES[model.kind] // model.sizes.multiple) * model.sizes.multiple
    usual = {"width": side, "height": side, "num_frames": FRAMES, "num_inference_steps": 2 + index % 2}
    call = {name: value for name, value in usual.items() if name in takes} | call
    own = {field.name for field in msgspec.structs.fields(Generate)}
    fields: dict[str, Any] = {name: value for name, value in call.items() if name in own}
    extra = {name: value for name, value in call.items() if name not in own}
    sample = Sample(PROMPTS[index], seed=100 + index)
    return Generate(request_id=str(index), samples=[sample], extra=extra, output_format="pt", **fields)


def _called(plain: DiffusionPipeline, model: Model, request: Generate) -> torch.Tensor:
    """What plain diffusers makes of the request's arguments; the first output type that it knows is kept."""
    run = SampleRun(model, request, 0, lambda *_: None, lambda _: None)
    return first_output(plain(**run.arguments())).float()


def _worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of a pixel; 1 where shapes differ."""
    pairs = list(zip(found, expected, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return 1.0
    return max((a - b).abs().max().item() for a, b in pairs)
