"""An adapter stays in force where requests run one at a time and the components are restored after each."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from msgspec.structs import replace
from safetensors.torch import load

from safelight.protocol.adapters import SetAdapters
from safelight.protocol.config import Config
from safelight.protocol.generation import Result
from safelight.protocol.messages import FromWorker
from safelight.tests.tiny import save
from safelight.tests.worker.lora.agreement import (
    ADAPTERS,
    Peft,
    arguments,
    change,
    distance,
    new_adapters,
    request,
    source,
    write_adapter,
)
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.model.model import Model, load_model
from safelight.worker.requests.jobs import Jobs
from safelight.worker.self_test.self_test import SelfTest


def served(jobs: Jobs, batcher: Batcher, sent: list[FromWorker], model: Model, index: int) -> torch.Tensor:
    jobs.submit(replace(request("sd3_pag", index), output_format="pt"))
    end = time.monotonic() + 60
    while batcher.busy or jobs.stats().running:
        batcher.step()
        assert not jobs.collect()
        assert time.monotonic() < end
    (result,) = sent
    assert isinstance(result, Result)
    sent.clear()
    return load(bytes(result.outputs[0].data))["t"]


def test_every_request_in_serial_mode_has_the_adapter_and_not_the_first_alone(tmp_path: Path) -> None:
    checkpoint, made = save("sd3_pag", tmp_path), ADAPTERS[1]
    config = Config(model=str(checkpoint), device="cpu", batching="serial")
    model = load_model(config)
    assert SelfTest(model, config).run().mode == "serial"
    folder = write_adapter(made, model.pipeline.transformer, tmp_path / "adapters")
    peft = Peft(checkpoint, [(made, folder)])
    calls = [arguments(model, request("sd3_pag", index)) for index in (0, 1, 0)]
    expected = [peft.draw(dict(call), [(made.nickname, 1.0)]) for call in calls]
    adapters = new_adapters(model)
    change(adapters, SetAdapters(nicknames=[made.nickname], strengths=[1.0], mode="dynamic", sources=[source(folder)]))
    batcher, sent = (
        Batcher(max_batch=16, max_tokens=10**6, mode="serial", resources=ForwardResources(adapters=adapters)),
        list[FromWorker](),
    )
    jobs = Jobs(model, batcher, sent.append, adapters=adapters)
    drawn = [served(jobs, batcher, sent, model, index) for index in (0, 1, 0)]
    jobs.close()
    assert max(map(distance, drawn, expected)) < 1e-5
    plain = peft.draw(dict(arguments(model, request("sd3_pag", 0))), ())
    assert distance(expected[0], plain) > 1e-3, "an adapter that changes nothing proves nothing"
