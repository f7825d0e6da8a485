"""Quantized weights on a GPU: what is written to them is encoded, also where the GPU is full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from safelight.tests.played import Record
from safelight.worker.accuracy.admission import admit
from safelight.worker.model.modules import modules
from safelight.worker.offloading.offloading import Offloading
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.weights.quantizing.base import QuantizedWeight
from safelight.worker.weights.quantizing.layers import QuantizedLayer, QuantizedLinear, become_quantized
from safelight.worker.weights.quantizing.schemes import SCHEMES, Scheme

from .device import device, on_devices, played_only
from .replica import Replica

pytestmark = on_devices

ROWS, COLUMNS = 96, 64


def layer(scheme: Scheme) -> QuantizedLayer:
    plain = nn.Linear(COLUMNS, ROWS, bias=False)
    become_quantized(plain, QuantizedLinear, scheme)
    assert isinstance(plain, QuantizedLayer)
    return plain.to(device())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_makes_the_codes_of_the_cpu(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = torch.randn(ROWS, COLUMNS, dtype=dtype)
    for found, expected in zip(scheme.encode(weight.to(device())), scheme.encode(weight), strict=True):
        assert torch.equal(found.cpu(), expected)


@played_only
@pytest.mark.parametrize("rows", [None, slice(32, 96)], ids=["whole", "fused"])
def test_a_full_gpu_gets_the_codes_of_what_was_written_from_the_host(rows: slice | None, record: Record) -> None:
    scheme = SCHEMES["int8"]
    quantized = layer(scheme)
    kept = quantized.codes.cpu()[:32].clone()
    base = torch.randn(ROWS, COLUMNS)[slice(None) if rows is None else rows]
    held = QuantizedWeight(quantized, rows, base)
    codes, scale = scheme.encode(base)
    record.memory(device()).limit = torch.cuda.memory_allocated(device()) + 1000
    with pytest.raises(torch.OutOfMemoryError):
        base.to(device())
    held.encode()
    assert torch.equal(quantized.codes.cpu()[-len(base) :], codes)
    assert torch.equal(quantized.scale.cpu()[-len(base) :], scale)
    if rows is not None:
        assert torch.equal(quantized.codes.cpu()[:32], kept)


def test_quantized_components_that_rest_on_the_host_are_compared_with_the_checkpoint_s(
    checkpoint: Callable[[str], Path],
) -> None:
    accuracy = []
    for offload in ("off", "component"):
        replica = Replica(checkpoint("flux"), device(), quantize="int8", offload=offload)
        if offload != "off":
            replica.model.offload = Offloading(modules(replica.model.pipeline), device(), by_block=False)
        accuracy.append(admit(replica.model, ALONE, None))
        replica.close()
    assert accuracy[0] == accuracy[1]
