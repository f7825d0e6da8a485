"""The environment of a rollout: the denoiser's arguments other than the latents, recorded at the boundary.

A trainer repeats the forwards with it. How the pipeline combined the denoiser's answers is found out by trying rules:
the reply names the one that reproduces the scheduler's input, or none.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ...rollout.equality import equal
from ..crossing.call import Call
from ..pipelines.components import DENOISERS
from .combining import Combined, Trial, possible
from .late_values import LateEqualities

_TIMESTEPS = ("timestep", "timesteps", "t")
_GUIDANCE = ("guidance_scale", "true_cfg_scale")
_IMAGE, _POSITIONS = "image", "rotary"
"""Arguments from input images have the first in their name, but not the second, which marks positions of the output."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A call of the denoiser with its arguments by name."""

    component: str
    arguments: dict[str, Any]
    latents: str
    timestep: str | None
    output: Any

    @property
    def rows(self) -> int:
        return len(self.arguments[self.latents])


class Environment:
    """Records the denoiser's calls of a sample. ``scales`` are candidates for the guidance scale, the likeliest first.

    ``from_images``: the request has images. A trainer can repeat the calls only if their arguments are equal at every
    step and their latents are the sampler's state.
    """

    def __init__(self, scales: list[float], *, from_images: bool) -> None:
        self._scales = scales
        self._from_images = from_images
        self._calls: list[_Seen] = []
        self._first: list[_Seen] = []
        self._components: list[str] = []
        self._timesteps: list[torch.Tensor] = []
        self._combined: list[Combined | None] = []
        self._trial: Trial | None = None
        self._alike = LateEqualities()

    def saw(self, call: Call, output: Any) -> None:
        """Record ``call`` if it is the denoiser's."""
        if call.name not in DENOISERS:
            return
        forward = call.function.forward if isinstance(call.function, nn.Module) else call.function
        bound = _signature(forward).bind(*call.args, **call.kwargs).arguments
        latents = next(iter(bound))
        timestep = next((name for name in _TIMESTEPS if name in bound), None)
        arguments = {name: value for name, value in bound.items() if name != "return_dict"}
        self._calls.append(_Seen(call.component, arguments, latents, timestep, output))

    def stepped(self, velocity: torch.Tensor, sample: torch.Tensor) -> None:
        """Note a step, whose ``velocity`` came from the calls since the last step."""
        calls, self._calls = self._calls, []
        if not self._first:
            self._first = [_Seen(one.component, one.arguments, one.latents, one.timestep, None) for one in calls]
            self._alike.remember([one.arguments for one in self._first])
        times = [seen.arguments[seen.timestep] for seen in calls if seen.timestep is not None]
        same = [torch.as_tensor(time).reshape(-1) for time in times]
        self._compare(calls, sample, same)
        self._components.append(calls[0].component if calls else "")
        self._timesteps += [time[:1].detach() for time in same[:1]]
        self._settle()
        answers = _answers(calls, velocity)
        if answers is None:
            self._combined.append(None)
            return
        before = self._before
        self._trial = Trial(
            answers, velocity, [before] if before is not None else [*possible(len(answers), self._scales)]
        )
        if not self._trial.is_late:
            self._settle()

    def _compare(self, calls: list[_Seen], sample: torch.Tensor, times: list[torch.Tensor]) -> None:
        """Compare the calls with those of the first step, and their latents with the state."""
        self._alike.expect(0 < len(calls) == len(self._first))
        for seen, first in zip(calls, self._first, strict=False):
            self._alike.compare(_conditions_of(seen), _conditions_of(first))
        for seen in calls:
            _compare_latents(self._alike, seen.arguments[seen.latents], sample)
        for time in times:
            self._alike.compare(time, times[0][:1].expand_as(time))

    @property
    def _before(self) -> Combined | None:
        """The last combination that was found."""
        return next((one for one in reversed(self._combined) if one is not None), None)

    def _settle(self) -> None:
        """Decide about the last step: its combination is the one before if that fits, else the best fit, or ``None``.

        A step later, the distances have arrived on the host. A rule that no longer fits is searched for anew.
        """
        trial, self._trial = self._trial, None
        if trial is None:
            return
        found = trial.best()
        if found is None and len(trial.tried) == 1 and self._before is not None:
            found = Trial(trial.answers, trial.velocity, [*possible(len(trial.answers), self._scales)]).best()
        self._combined.append(found)

    def reported(self) -> dict[str, Any]:
        """The environment for the reply, with tensors. ``replay`` is ``None`` if the calls cannot be repeated."""
        self._settle()
        combined = [one for one in self._combined if one is not None]
        kinds = {(one.rule, one.sign, one.widened, one.swapped) for one in combined}
        chosen = combined[0] if len(combined) == len(self._combined) and len(kinds) == 1 else None
        joined = len(self._first) == 1 and self._first[0].rows == 2
        swapped = chosen is not None and chosen.swapped
        conditions = _conditions(self._first, joined=joined, swapped=swapped)
        image, positive, negative = _by_origin(conditions, from_images=self._from_images)
        guidance = {"rule": None, "scale": None, "sign": None, "widened": None}
        if chosen is not None:
            scales = [one.scale for one in combined]
            guidance = {"rule": chosen.rule, "scale": scales, "sign": chosen.sign, "widened": chosen.widened}  # type: ignore[dict-item]  # of several kinds
        repeatable = chosen is not None and self._alike.hold()
        return {
            "image_kwargs": image,
            "pos_cond_kwargs": positive,
            "neg_cond_kwargs": negative,
            "guidance": guidance,
            "replay": self._replay(joined=joined, swapped=swapped) if repeatable else None,
        }

    def _replay(self, *, joined: bool, swapped: bool) -> dict[str, Any]:
        first = self._first[0]
        latents = first.arguments[first.latents]
        order = "negative_first" if swapped else "positive_first"
        return {
            "components": self._components,
            "latents": first.latents,
            "shape": list(latents[0].shape),
            "dtype": str(latents[0].dtype).removeprefix("torch."),
            "listed": isinstance(latents, list),
            "timestep": first.timestep,
            "timesteps": torch.cat(self._timesteps) if self._timesteps else None,
            "joined": order if joined else None,
            "shared": _shared(first) if joined else [],
        }


@functools.lru_cache(maxsize=16)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def likely_scales(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> list[float]:
    """Candidates for the guidance scale: the values of all arguments whose names contain "scale"."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    names = sorted((name for name in parameters if "scale" in name), key=lambda name: name not in _GUIDANCE)
    values = (arguments.get(name, parameters[name].default) for name in names)
    return list(dict.fromkeys(float(value) for value in values if isinstance(value, int | float)))


def _answers(calls: list[_Seen], velocity: torch.Tensor) -> list[torch.Tensor] | None:
    """The denoiser's one or two answers (with and without the prompt), from one call or two; ``None`` otherwise."""
    rows: list[torch.Tensor] = []
    for seen in calls:
        output = seen.output[0] if isinstance(seen.output, tuple) else getattr(seen.output, "sample", seen.output)
        rows += [row for row in output if isinstance(row, torch.Tensor)]
    if len(rows) not in (1, 2) or any(row.numel() != velocity.numel() for row in rows):
        return None
    return [row.reshape(velocity.shape) for row in rows]


def _conditions_of(seen: _Seen) -> dict[str, Any]:
    """A call's arguments except latents and timestep."""
    return {name: value for name, value in seen.arguments.items() if name not in (seen.latents, seen.timestep)}


def _compare_latents(late: LateEqualities, latents: Any, sample: torch.Tensor) -> None:
    """Expect that every row of the latents is the state."""
    if latents is sample:
        return
    for row in latents:
        if row.numel() == sample.numel():
            late.compare(row.reshape(sample.shape), sample.to(row.dtype))
        else:
            late.expect(holds=False)


def _conditions(calls: list[_Seen], *, joined: bool, swapped: bool) -> list[dict[str, Any]]:
    """The arguments other than latents and timestep, of the positive answer and of the negative one if it exists."""
    own = [
        {name: _kept(value) for name, value in seen.arguments.items() if name not in (seen.latents, seen.timestep)}
        for seen in calls
    ]
    halves = [{name: _half(value, half) for name, value in own[0].items()} for half in (0, 1)] if joined else own[:2]
    return halves[::-1] if swapped else halves


def _shared(joined: _Seen) -> list[str]:
    """The arguments of a joined call that do not have one row per answer."""
    return [name for name, value in joined.arguments.items() if _is_reported(value) and not _has_two_rows(value)]


def _by_origin(
    parts: list[dict[str, Any]], *, from_images: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Divide the arguments by name into those from input images, and the others of the positive and negative answer."""
    reported = [{name: value for name, value in part.items() if _is_reported(value)} for part in parts]
    if not reported:
        return {}, {}, None
    positive = reported[0]
    image = {
        name: value
        for name, value in positive.items()
        if from_images and _is_of_an_image(name) and all(name in one and equal(one[name], value) for one in reported)
    }
    rest = [{name: value for name, value in one.items() if name not in image} for one in reported]
    return image, rest[0], rest[1] if len(rest) == 2 else None


def _is_of_an_image(name: str) -> bool:
    return _IMAGE in name and _POSITIONS not in name


def _is_reported(value: Any) -> bool:
    """False for ``None``, which equals a missing argument, and for dictionaries, for attention processors only."""
    return value is not None and not isinstance(value, dict)


def _has_two_rows(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor | list)
        and (not isinstance(value, torch.Tensor) or value.ndim > 0)
        and (len(value) == 2)
    )


def _half(value: Any, half: int) -> Any:
    return value[half : half + 1] if _has_two_rows(value) else value


def _kept(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value
