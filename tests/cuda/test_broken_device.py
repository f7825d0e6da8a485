"""A device that no longer works ends the worker's process: the supervisor starts another, and no client is blamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from safelight.tests.effort import NIGHTLY
from safelight.tests.live import LiveServer
from safelight.tests.system.asking import ask, body, picture

from .device import TYPE, device, of_programs, played_only
from .replica import Replica


def broken(*_: object, **__: object) -> torch.Tensor:
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_an_assertion_on_the_device_is_not_blamed_on_a_request(
    component: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(checkpoint("flux"), device())
    module = replica.model.pipeline.components[component]
    monkeypatch.setattr(type(module), "decode" if component == "vae" else "forward", broken)
    with pytest.raises(torch.AcceleratorError):
        replica.answers(*[replica.request(index) for index in range(2)])
    assert not replica.sent, "nobody is answered; the scheduler repeats what had not begun"
    replica.close()


@played_only
@pytest.mark.skipif(not NIGHTLY, reason="it starts two workers that import torch")
def test_a_worker_whose_device_breaks_while_it_serves_ends_and_another_one_serves(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The worker that runs the request finds its device broken; the file that breaks it is gone for the next one."""
    breaks, asked = tmp_path / "breaks", body("flux", deterministic=True)
    flags = ["--device", TYPE, "--dtype", "float32", "--threads", "1"]
    environment = of_programs(PLAYED_BREAKS=str(breaks))
    with LiveServer(checkpoint("flux"), flags, program=True, environment=environment) as server:
        server.wait_ready(300)
        expected = picture(ask(server.url, asked))
        breaks.touch()
        answer = httpx.post(f"{server.url}/generate", json=asked, timeout=60)
        assert answer.status_code == 503, answer.text
        assert "Send the request again" in answer.text
        assert "the device no longer works in this process" in server.log
        assert "ended with status 1" in server.log
        server.wait_ready(300)
        assert torch.equal(picture(ask(server.url, asked)), expected)
