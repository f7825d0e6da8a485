"""Interceptors of a sample's calls. To add one, write a class here and list it in ``SampleRun.interceptors``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from diffusers.utils import BaseOutput
from torch.utils import _pytree as pytree

from ...protocol.errors import InvalidRequest
from ..pipelines.components import DENOISERS
from .call import Call
from .chain import Proceed

K = TypeVar("K")


@dataclass(slots=True)
class Clock:
    """Timestamps of a sample, in seconds of ``time.perf_counter``."""

    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first_denoise: float | None = None
    last_step: float | None = None

    def __call__(self, call: Call, proceed: Proceed) -> Any:
        if self.first_denoise is None and is_of_denoiser(call):
            self.first_denoise = time.perf_counter()
        (answer,) = proceed(call)
        return answer


class NoiseCheck:
    """Refuses initial noise of a wrong shape, which most pipelines accept.

    ``shapes`` are those of the denoiser's first call with the pipeline's own noise.
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self._shapes: Sequence[torch.Size] | None = shapes

    def __call__(self, call: Call, proceed: Proceed) -> Any:
        if self._shapes is not None and call.name in DENOISERS:
            if shapes(call) != self._shapes:
                raise InvalidRequest("initial_noise has another shape than such a sample's.", field="initial_noise")
            self._shapes = None
        (answer,) = proceed(call)
        return answer


class Recorder(Generic[K]):
    """Calls ``saw`` with ``keep(call)``, taken before the call runs, and the answer."""

    def __init__(self, keep: Callable[[Call], K], saw: Callable[[K, Any], None]) -> None:
        self._keep = keep
        self._saw = saw

    def __call__(self, call: Call, proceed: Proceed) -> Any:
        kept = self._keep(call)
        (answer,) = proceed(call)
        self._saw(kept, answer)
        return answer


def without_denoiser(call: Call, proceed: Proceed) -> Any:
    """Answer the denoiser's calls with zeros."""
    if call.component not in DENOISERS or call.method != "__call__":
        (answer,) = proceed(call)
        return answer
    values = (*call.args, *call.kwargs.values())
    primary = next(v for v in values if isinstance(v, list) or (isinstance(v, torch.Tensor) and v.ndim > 0))
    zeros = pytree.tree_map(torch.zeros_like, primary)
    return (zeros,) if call.kwargs.get("return_dict") is False else BaseOutput(sample=zeros)


def is_of_denoiser(call: Call) -> bool:
    """True for calls to a denoiser or to a part of one."""
    return call.component.split(".")[0] in DENOISERS


def shapes(call: Call) -> list[torch.Size]:
    """The shapes of the tensors among the call's arguments."""
    return [leaf.shape for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, torch.Tensor)]
