"""A device that no longer works ends the worker's process: the supervisor starts another, and no client is blamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .device import device
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
