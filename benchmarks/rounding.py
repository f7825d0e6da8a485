"""How far rounding moves a picture: that of shared forwards, that of plain fp32, and a change of the last bit."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from safelight.benchmarks.drawing import draw, loaded
from safelight.protocol.forward_options import ForwardOptions
from safelight.protocol.generation import Generate
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.model.model import Model

Answer = tuple[torch.Tensor, ...]
Hook = Callable[[torch.nn.Module, Answer, dict[str, Any], Answer], Answer]


def rounding(directory: Path, asked: Sequence[Generate]) -> dict[str, float]:
    """The largest difference of a pixel from requests that run alone and unpaired, over ``asked``.

    ``float64`` computes the denoiser in fp64; ``last bit`` changes each of its answers by one unit in the last place.
    """
    model = loaded(directory)
    plain = _drawn(model, asked)
    others = {
        "paired": _drawn(model, asked, pairing="on"),
        "merged": _drawn(model, asked, together=len(asked)),
        "last_bit": _hooked(model, _last_bit(), asked),
        "float64": _hooked(model, _in_float64(model), asked),
    }
    found = {}
    for name, outputs in others.items():
        errors = [float((a - b).abs().max()) for a, b in zip(outputs, plain, strict=True)]
        found |= {name: float(f"{max(errors):.1e}"), f"{name}_median": float(f"{statistics.median(errors):.1e}")}
    return found


def _drawn(
    model: Model, asked: Sequence[Generate], *, pairing: str = "off", together: int = 1
) -> Sequence[torch.Tensor]:
    options = ForwardOptions(guidance_pairing="on" if pairing == "on" else "off")
    return draw(model, asked, options, PromptCache(2**28), together=together).outputs


def _hooked(model: Model, hook: Hook, asked: Sequence[Generate]) -> Sequence[torch.Tensor]:
    handle = model.pipeline.transformer.register_forward_hook(hook, with_kwargs=True)
    try:
        return _drawn(model, asked)
    finally:
        handle.remove()


def _last_bit() -> Hook:
    signs = torch.Generator().manual_seed(0)

    def changed(_: torch.nn.Module, __: Answer, ___: dict[str, Any], answer: Answer) -> Answer:
        sign = torch.randint(0, 2, answer[0].shape, generator=signs) * 2 - 1
        return (torch.nextafter(answer[0], sign * torch.inf), *answer[1:])

    return changed


def _in_float64(model: Model) -> Hook:
    exact = copy.deepcopy(model.pipeline.transformer).double()

    def computed(_: torch.nn.Module, args: Answer, kwargs: dict[str, Any], answer: Answer) -> Answer:
        found = exact(*map(_double, args), **{name: _double(value) for name, value in kwargs.items()})
        return (found[0].to(answer[0].dtype), *answer[1:])

    return computed


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
