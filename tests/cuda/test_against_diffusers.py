"""A live server on a GPU beside plain diffusers on the same GPU.

``make test`` runs these tests where there is a GPU. ``TEST_DEVICE=cpu`` runs them on a CPU, which tries the tests, and
the nightly tests run them on a played GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from safelight.client import Client
from safelight.client.checksum import checksum
from safelight.protocol.adapters import WantedMode
from safelight.tests.effort import NIGHTLY
from safelight.tests.live import LiveServer
from safelight.tests.system.asking import ask, ask_together, body, load_plain, picture, plain
from safelight.tests.worker.lora.agreement import Made, Peft, write_adapter

from .device import PLAYED, TYPE, device, of_programs

pytestmark = pytest.mark.skipif(PLAYED and not NIGHTLY, reason="test_live is enough of live servers on a played GPU")

FLAGS = ("--device", TYPE, "--dtype", "float32", "--threads", "1")
MODES: tuple[WantedMode, ...] = ("merge", "dynamic")
CLOSE = 5e-3
"""The largest change of a pixel in [0, 1] by merging: cuDNN rounds to TF32, and batch sizes differ in kernels."""


def load(directory: Path) -> DiffusionPipeline:
    return load_plain(directory).to(device())


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl", "zimage", "qwenimage", "wan"])
def test_deterministic_requests_are_bitwise_diffusers_and_merged_ones_are_close(
    family: str, checkpoint: Callable[[str], Path]
) -> None:
    pipeline = load(checkpoint(family))
    bodies = [body(family, index) for index in range(6)]
    expected = [plain(pipeline, asked).cpu() for asked in bodies]
    with LiveServer(checkpoint(family), FLAGS, program=True, environment=of_programs()) as server:
        server.wait_ready()
        alone = picture(ask(server.url, bodies[0] | {"deterministic": True}))
        together = [picture(answer.json()) for answer in ask_together(server.url, bodies)]
    assert torch.equal(alone, expected[0])
    assert max((a - b).abs().max().item() for a, b in zip(together, expected, strict=True)) <= CLOSE


@pytest.mark.parametrize("offload", ["off", "component", "block"])
def test_updates_sleep_and_adapters_leave_the_bytes_that_they_should(
    offload: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    if offload != "off" and TYPE != "cuda":
        pytest.skip("a CPU has nothing to offload to")
    directory = checkpoint("flux")
    flags = [*FLAGS, "--offload", offload, "--weights-roots", f"{directory}{os.pathsep}{tmp_path}"]
    files = {name: module.sha256 for name, module in checksum(directory).items()}
    new = {
        name: tensor + 0.1
        for name, tensor in load_file(directory / "transformer" / "diffusion_pytorch_model.safetensors").items()
    }
    pipeline = load(directory)
    pipeline.transformer.load_state_dict(new)
    asked = body("flux", deterministic=True)
    with (
        LiveServer(directory, flags, program=True, environment=of_programs()) as server,
        Client(server.wait_ready().url) as client,
    ):
        assert client.weights.checksum() == files
        client.weights.update(new, version="step-1")
        client.weights.verify(new)
        assert torch.equal(picture(ask(server.url, asked)), plain(pipeline, asked).cpu())
        updated = client.weights.checksum()
        client.sleep()
        client.wake()
        assert client.weights.checksum() == updated
        client.weights.update_from_disk(directory)
        assert client.weights.checksum() == files
        plain_picture = picture(ask(server.url, asked))
        made = Made("first", 4, 2.0, seed=1)
        adapter = write_adapter(made, load_plain(directory).transformer, tmp_path)
        peft = Peft(directory, [(made, adapter)])
        peft.pipeline.to(device())
        peft.pipeline.transformer.set_adapters(["first"], [1.0])
        expected = plain(peft.pipeline, asked).cpu()
        for mode in MODES:
            client.set_lora("first", adapter, mode=mode)
            assert (picture(ask(server.url, asked)) - expected).abs().max() <= CLOSE
            client.sleep()
            client.wake()
            assert client.weights.checksum() == files
            assert (picture(ask(server.url, asked)) - expected).abs().max() <= CLOSE
            client.unload_lora("first")
            assert torch.equal(picture(ask(server.url, asked)), plain_picture)
