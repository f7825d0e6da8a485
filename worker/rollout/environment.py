"""The environment of a rollout is what crossed the boundary: what the denoiser was given beside the latents.

With it a trainer makes the same forwards again. How the pipeline put the answers together is found out by trying: the
rule that gives what the scheduler was given is told, or that none does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...rollout.guidance import GUIDED, Rule, guided
from ..call import Call

_TIMESTEPS = ("timestep", "timesteps", "t")
_OF_THE_IMAGE = ("img", "image", "rotary")
_EXACT_ENOUGH = 1e-3
"""Of the velocity, in relative L2: a rule that comes closer is the pipeline's."""


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


@dataclass(frozen=True, slots=True)
class _Combined:
    """How a step's velocity was made: ``sign`` times the denoiser's answers, ``guided`` by ``scale``.

    ``swapped`` says that the positive answer is the second.
    """

    rule: Rule
    scale: float
    sign: int
    swapped: bool


class Environment:
    """Sees the denoiser's calls of a sample. ``scales`` are the numbers that may be a guidance scale."""

    def __init__(self, scales: list[float]) -> None:
        self._scales = scales
        self._calls: list[_Seen] = []
        self._first: list[_Seen] = []
        self._components: list[str] = []
        self._timesteps: list[torch.Tensor] = []
        self._combined: list[_Combined | None] = []
        self._shape: tuple[int, ...] = ()

    def saw(self, call: Call, output: Any) -> None:
        forward = call.function.forward if isinstance(call.function, nn.Module) else call.function
        bound = inspect.signature(forward).bind(*call.args, **call.kwargs).arguments
        arguments = {name: value for name, value in bound.items() if name not in ("args", "kwargs")}
        latents = next(iter(arguments))
        timestep = next((name for name in _TIMESTEPS if name in arguments), None)
        self._calls.append(_Seen(call.component, arguments, latents, timestep, output))

    def stepped(self, velocity: torch.Tensor, sample: torch.Tensor) -> None:
        """A step is taken by the velocity that the calls since the last one have led to."""
        calls, self._calls = self._calls, []
        if not calls:
            self._combined.append(None)
            return
        if not self._first:
            self._first, self._shape = calls, tuple(sample.shape)
        self._components.append(calls[0].component)
        if calls[0].timestep is not None:
            self._timesteps.append(torch.as_tensor(calls[0].arguments[calls[0].timestep]).reshape(-1)[:1].detach())
        self._combined.append(self._combination(_answers(calls, velocity), velocity))

    def told(self) -> dict[str, Any]:
        """As the reply has it, with tensors."""
        combined = [one for one in self._combined if one is not None]
        agree = len(combined) == len(self._combined) and len({(c.rule, c.sign, c.swapped) for c in combined}) == 1
        if not self._first or not agree:
            given = [{name: _kept(value) for name, value in seen.arguments.items()} for seen in self._first]
            return {"image_kwargs": {}, "pos_cond_kwargs": given[0] if given else {}, "neg_cond_kwargs": None} | {
                "guidance": {"rule": None, "scale": None, "sign": None},
                "replay": None,
            }
        first, chosen = self._first[0], combined[0]
        parts = _conditions(self._first, swapped=chosen.swapped)
        shared, positive, negative = _apart(parts)
        joined = None
        if len(self._first) == 1 and first.rows == 2:
            joined = "negative_first" if chosen.swapped else "positive_first"
        latents = first.arguments[first.latents]
        return {
            "image_kwargs": shared,
            "pos_cond_kwargs": positive,
            "neg_cond_kwargs": negative,
            "guidance": {"rule": chosen.rule, "scale": [one.scale for one in combined], "sign": chosen.sign},
            "replay": {
                "components": self._components,
                "latents": first.latents,
                "shape": list(latents[0].shape),
                "listed": isinstance(latents, list),
                "timestep": first.timestep,
                "timesteps": torch.cat(self._timesteps) if self._timesteps else None,
                "joined": joined,
            },
        }

    def _combination(self, answers: list[torch.Tensor] | None, velocity: torch.Tensor) -> _Combined | None:
        if answers is None:
            return None
        tried = [(_distance(one, answers, velocity), one) for one in self._possible(len(answers))]
        distance, best = min(tried, key=lambda pair: pair[0])
        return best if distance < _EXACT_ENOUGH else None

    def _possible(self, answers: int) -> Iterator[_Combined]:
        for sign in (1, -1):
            if answers == 1:
                yield _Combined("none", 1.0, sign, swapped=False)
                continue
            for rule in GUIDED:
                for scale in self._scales:
                    yield _Combined(rule, scale, sign, swapped=False)
                    yield _Combined(rule, scale, sign, swapped=True)


def _distance(how: _Combined, answers: list[torch.Tensor], velocity: torch.Tensor) -> float:
    positive, negative = (answers[0], None) if len(answers) == 1 else answers
    if how.swapped:
        assert negative is not None, "there are two"
        positive, negative = negative, positive
    made = how.sign * guided(how.rule, positive, negative, how.scale)
    return float((made.float() - velocity.float()).norm() / velocity.float().norm().clamp_min(1e-30))


def _answers(calls: list[_Seen], velocity: torch.Tensor) -> list[torch.Tensor] | None:
    """What the denoiser said of the one sample: once, or with its prompt and without, in one call or in two."""
    rows: list[torch.Tensor] = []
    for seen in calls:
        output = seen.output[0] if isinstance(seen.output, tuple) else getattr(seen.output, "sample", seen.output)
        rows += [row for row in output if isinstance(row, torch.Tensor)]
    if len(rows) not in (1, 2) or any(row.numel() != velocity.numel() for row in rows):
        return None
    return [row.reshape(velocity.shape) for row in rows]


def _conditions(calls: list[_Seen], *, swapped: bool) -> list[dict[str, Any]]:
    """The arguments beside latents and timestep: of the positive answer, and of the negative, if there is one."""
    own = [
        {
            name: _kept(value)
            for name, value in seen.arguments.items()
            if name not in (seen.latents, seen.timestep, "return_dict")
        }
        for seen in calls
    ]
    if len(calls) == 1 and calls[0].rows == 2:
        own = [{name: _half(value, half) for name, value in own[0].items()} for half in (0, 1)]
    return own[::-1] if swapped else own


def _apart(parts: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """What is of the image, as far as can be told, what of the prompt, and what of the negative one."""
    positive = {name: value for name, value in parts[0].items() if _tells(value)}
    if len(parts) == 1:
        shared = {name for name in positive if any(word in name for word in _OF_THE_IMAGE)}
        negative = None
    else:
        shared = {name for name, value in positive.items() if name in parts[1] and _equal(value, parts[1][name])}
        negative = {name: value for name, value in parts[1].items() if name not in shared and _tells(value)}
    image = {name: positive[name] for name in positive if name in shared}
    return image, {name: value for name, value in positive.items() if name not in shared}, negative


def _tells(value: Any) -> bool:
    """``None`` is what an argument that is left out is; dictionaries are for attention processors of other kinds."""
    return value is not None and not isinstance(value, dict)


def _half(value: Any, half: int) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == 2:
        return value[half : half + 1]
    return [value[half]] if isinstance(value, list) and len(value) == 2 else value


def _kept(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)
