"""Plain diffusers on one GPU, eager and compiled, and the speed of the GPU's copies: what the server stands beside."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

PROMPT = "a small yellow star at the top left on a black background"


class Plain:
    """Calls of ``pipeline`` that make one ``output`` each."""

    def __init__(self, pipeline: DiffusionPipeline, output: Mapping[str, Any]) -> None:
        self._pipeline = pipeline
        self._pipeline.set_progress_bar_config(disable=True)
        takes = inspect.signature(pipeline.__call__).parameters
        arguments = {**output, **output.get("extra", {})}
        self._arguments = {name: value for name, value in arguments.items() if name in takes}

    def seconds(self) -> dict[str, Any]:
        """Seconds of a call, after a short one has loaded the kernels."""
        self._call(num_inference_steps=2)
        return {"output_s": timed(self._call)}

    def compiled_seconds(self, backend: str) -> dict[str, Any]:
        """The same with the denoiser's repeated blocks compiled."""
        self._pipeline.transformer.compile_repeated_blocks(backend=backend)
        warm_up = timed(lambda: self._call(num_inference_steps=2))
        return {"output_s": timed(self._call), "compile_s": warm_up}

    def _call(self, **arguments: Any) -> None:
        self._pipeline(PROMPT, **self._arguments | arguments, output_type="pt")


def copy_speeds(device: str, nbytes: int) -> dict[str, Any]:
    """Gigabytes per second of copies between host and device, from pinned memory, and within the device."""
    on_host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device == "cuda")
    here, there = torch.empty_like(on_host, device=device), torch.empty_like(on_host, device=device)
    pairs = {"host_to_device": (here, on_host), "device_to_host": (on_host, here), "device_to_device": (there, here)}
    found = {}
    for name, (target, source) in pairs.items():
        target.copy_(source)
        found[f"{name}_gb_per_s"] = nbytes / 1e9 / timed(lambda: target.copy_(source))  # noqa: B023  # called here
    return found


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call, until the device has finished."""
    _wait()
    began = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
