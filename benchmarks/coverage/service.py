"""A replica without its process: jobs, batcher and encoding, as a worker puts them together."""

from __future__ import annotations

import time

import torch
from safetensors.torch import load

from safelight.protocol.config import Config
from safelight.protocol.generation import Failed, Generate, Result
from safelight.protocol.messages import FromWorker
from safelight.protocol.self_test import SelfTestResult
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.runner import Counters
from safelight.worker.model.model import Model
from safelight.worker.requests.jobs import Jobs


class RequestFailed(Exception):
    """A request ended without a result; the text is what its sender would read."""


class Service:
    """Answers requests for ``model`` in the mode of ``self_test``."""

    def __init__(self, model: Model, self_test: SelfTestResult, config: Config) -> None:
        self.batcher = Batcher(max_batch=config.max_batch, max_tokens=config.max_positions, mode=self_test.mode)
        self.batcher.policy.unmergeable.update(self_test.unmergeable)
        self._sent: list[FromWorker] = []
        self._jobs = Jobs(model, self.batcher, self._sent.append)

    def close(self) -> None:
        """End the encoding threads."""
        self._jobs.close()

    def files(self, requests: list[Generate]) -> list[bytes]:
        """The first output of each request, all asked for at once. Raises :class:`RequestFailed`."""
        self._sent.clear()
        for request in requests:
            self._jobs.submit(request)
        self._settle()
        ended = {message.request_id: message for message in self._sent if isinstance(message, Failed | Result)}
        return [_file(ended[request.request_id]) for request in requests]

    def tensors(self, requests: list[Generate]) -> list[torch.Tensor]:
        """As :meth:`files`, for requests whose format is ``"pt"``."""
        return [load(data)["t"] for data in self.files(requests)]

    def counted(self) -> Counters:
        """The counters since the last time, which start anew."""
        counters, self.batcher.runner.counters = self.batcher.runner.counters, Counters()
        return counters

    def _settle(self) -> None:
        while self.batcher.busy or self._jobs.stats().running:
            self.batcher.step()
            for request_id in self._jobs.collect():
                self._jobs.drop(request_id)
            if not self.batcher.busy:
                time.sleep(0.001)  # the encoding threads are at work


def _file(ended: Failed | Result) -> bytes:
    if isinstance(ended, Failed):
        raise RequestFailed(ended.error.message)
    return bytes(ended.outputs[0].data)
