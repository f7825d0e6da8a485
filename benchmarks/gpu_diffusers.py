"""Plain diffusers on one GPU, eager and compiled, and the speed of the GPU's copies: what the server stands beside."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline

from safelight.benchmarks.gpu_run import Figures

PROMPT = "a small yellow star at the top left on a black background"


class Plain:
    """Calls of ``pipeline`` that make one ``output`` each."""

    def __init__(self, pipeline: DiffusionPipeline, output: Mapping[str, Any]) -> None:
        self._pipeline = pipeline
        self._pipeline.set_progress_bar_config(disable=True)
        takes = inspect.signature(pipeline.__call__).parameters
        arguments = {**output, **output.get("extra", {})}
        self._arguments = {name: value for name, value in arguments.items() if name in takes}

    @classmethod
    def loaded(cls, directory: Path, device: torch.device, dtype: torch.dtype, output: Mapping[str, Any]) -> Self:
        """The checkpoint in ``directory`` on ``device``."""
        return cls(DiffusionPipeline.from_pretrained(directory, dtype=dtype).to(device), output)

    def seconds(self) -> Figures:
        """Seconds of a call, after a short one has loaded the kernels."""
        self._call(num_inference_steps=2)
        yield {"output_s": timed(self._call)}

    def compiled_seconds(self, backend: str) -> Figures:
        """The same with the denoiser's repeated blocks compiled."""
        self._pipeline.transformer.compile_repeated_blocks(backend=backend)
        yield {"compile_s": timed(lambda: self._call(num_inference_steps=2))}
        yield {"output_s": timed(self._call)}

    def _call(self, **arguments: Any) -> None:
        self._pipeline(PROMPT, **self._arguments | arguments, output_type="pt")


def copy_speeds(device: str, nbytes: int) -> Figures:
    """Gigabytes per second of copies between host and device, from pinned memory, and within the device."""
    on_host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device == "cuda")
    here, there = torch.empty_like(on_host, device=device), torch.empty_like(on_host, device=device)
    pairs = {"host_to_device": (here, on_host), "device_to_host": (on_host, here), "device_to_device": (there, here)}
    for name, (target, source) in pairs.items():
        target.copy_(source)
        seconds = timed(lambda: target.copy_(source))  # noqa: B023  # called here
        yield {f"{name}_gb_per_s": nbytes / 1e9 / seconds}


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
