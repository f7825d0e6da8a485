"""A replica without its process: model, batcher and jobs, as a rank puts them together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load

from safelight.protocol.config import Config
from safelight.protocol.errors import ErrorInfo
from safelight.protocol.generation import Failed, Generate, Result, Sample
from safelight.protocol.messages import FromWorker
from safelight.protocol.replicas import BatchingMode
from safelight.tests.tiny import FAMILIES
from safelight.worker.forward.at_rest import AtRest
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.graphs.setting import new_graphs
from safelight.worker.lora.rank_adapters import RankAdapters
from safelight.worker.model.model import Model, load_model
from safelight.worker.model.modules import modules
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.requests.jobs import Jobs
from safelight.worker.requests.outputs import first_output
from safelight.worker.requests.sample import SampleRun

PROMPTS = ("a red circle", "two blue squares on a white table", "a star", "a red circle", "one heart", "a green cross")
WAIT_S = 120.0


class Replica:
    """Answers requests for a tiny family's model on ``device``; merges all that meet unless ``measured``."""

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        mode: BatchingMode = "merged",
        measured: bool = False,
        graphed: bool = False,
        **options: Any,
    ) -> None:
        self.family = FAMILIES[path.name]
        self.config = Config(model=str(path), device=device.type, dtype="float32", **options)
        self.model: Model = load_model(self.config, device)
        self.adapters = RankAdapters(
            self.model.pipeline, self.model.layouts, ALONE, device, max_adapters=8, max_bytes=10**9
        )
        components = modules(self.model.pipeline)
        self.batcher = Batcher(
            max_batch=self.config.max_batch,
            max_tokens=self.config.max_positions,
            mode=mode,
            resources=ForwardResources(
                cache=PromptCache(2**28),
                adapters=self.adapters,
                timing=self.model.timing,
                at_rest=AtRest(components),
                graphs=new_graphs(self.config, device, components, self.adapters, is_alone=True) if graphed else None,
            ),
        )
        self.batcher.policy.measured = measured
        self.sent: list[FromWorker] = []
        self.jobs = Jobs(self.model, self.batcher, self.sent.append, adapters=self.adapters)

    def request(self, index: int = 0, **changes: Any) -> Generate:
        """Request ``index`` of a mixed load: prompts, seeds and steps differ."""
        known = {field.name for field in msgspec.structs.fields(Generate)}
        call = dict(self.family.call) | {"num_inference_steps": 2 + index % 2}
        given = {name: value for name, value in call.items() if name in known}
        extra = {name: value for name, value in call.items() if name not in known}
        sample = Sample(PROMPTS[index % len(PROMPTS)], seed=100 + index)
        asked = Generate(request_id=str(index), samples=[sample], extra=extra, output_format="pt", **given)
        return msgspec.structs.replace(asked, **changes)

    def plain(self, asked: Generate, pipeline: DiffusionPipeline) -> torch.Tensor:
        """The result of plain diffusers, on the device of ``pipeline``."""
        arguments = SampleRun(self.model, asked, 0, lambda *_: None, lambda _: None).arguments()
        return first_output(pipeline(**arguments)).cpu()

    def draw(self, *requests: Generate) -> list[torch.Tensor]:
        """The first outputs of requests that are asked at once. Asserts that all succeed."""
        answers = self.answers(*requests)
        failed = [answer for answer in answers if not isinstance(answer, torch.Tensor)]
        assert not failed, failed
        return [answer for answer in answers if isinstance(answer, torch.Tensor)]

    def answers(self, *requests: Generate) -> list[torch.Tensor | ErrorInfo]:
        self.sent.clear()
        for asked in requests:
            self.jobs.submit(asked)
        self.settle()
        ended = {message.request_id: message for message in self.sent if isinstance(message, Failed | Result)}
        self.sent.clear()
        return [_answer(ended[asked.request_id]) for asked in requests]

    def settle(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while self.batcher.busy or self.jobs.stats().running:
            self.batcher.policy.limit(self.model.timing.changed_limits())
            self.batcher.step()
            for request_id in self.jobs.collect():
                self.jobs.drop(request_id)
            assert time.monotonic() < deadline

    def close(self) -> None:
        self.jobs.close()


def plain_pipeline(path: Path, device: torch.device) -> DiffusionPipeline:
    """The checkpoint as any user of diffusers loads it, on ``device``."""
    pipeline = DiffusionPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _answer(ended: Failed | Result) -> torch.Tensor | ErrorInfo:
    return ended.error if isinstance(ended, Failed) else load(bytes(ended.outputs[0].data))["t"]
