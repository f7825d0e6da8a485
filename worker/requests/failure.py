"""Turns the exception of a failed generation into an error for the client: whose fault it is, and why.

The self-test has proved that the model works with its defaults. So an exception that a library raises is attributed to
the values that the request gave, if any; one of our own code or of the device is not. No private detail is disclosed.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from ...protocol.errors import Internal, InvalidRequest, SafelightError, Unavailable
from ...protocol.fields import OF_PIPELINES
from ...protocol.generation import Generate

_MEMORY_RETRY_S = 5.0

_OURS = __name__.partition(".")[0]
_LIBRARIES = ("diffusers", "transformers")
_BETWEEN = ("crossing", "forward.batcher", "forward.recovery", "forward.runner", "forward.stages")
"""Our modules between a pipeline and its components; an exception that passes through them is not attributed to us."""

_ALLOCATION = re.compile(r"not enough memory|can't allocate memory", re.IGNORECASE)  # torch's messages on a CPU
_DEVICE = re.compile(r"CUDA|CUBLAS|cuDNN|CUDNN|NCCL")
_PRIVATE = re.compile(r"(/[\w.-]+){2,}|[A-Za-z]:\\|0x[0-9a-fA-F]{6,}")
"""Paths and memory addresses, which clients must not see."""

_LONGEST_REASON = 300
_LONGEST_VALUE = 60
_MOST_NAMED = 8
_HUGE = 1e4

_SIZES = ("width", "height", "num_frames", "fps")


class NotFinite(Exception):
    """A generation produced NaN or infinity."""


class NothingMade(Exception):
    """A pipeline returned no output."""

    def __init__(self) -> None:
        super().__init__("it returned no output")


def explain(error: BaseException, request: Generate, *, weights_are_sound: bool) -> SafelightError:
    """The error for the client that sent ``request``."""
    if isinstance(error, SafelightError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _says(error, _ALLOCATION):
        return Unavailable("the replica has not enough memory for this request", retry_after_s=_MEMORY_RETRY_S)
    if isinstance(error, NotFinite):
        return _not_finite(request, weights_are_sound)
    given = dict(_given(request))
    if given and isinstance(error, Exception) and _is_of_the_libraries(error) and not _says(error, _DEVICE):
        return _refused(error, given)
    return Internal("generation failed; the server's log has the details under this request's id")


def _not_finite(request: Generate, weights_are_sound: bool) -> SafelightError:
    numbers = {name: value for name, value in _given(request) if name not in _SIZES and _magnitude(value) is not None}
    if request.lora:
        numbers["lora"] = ", ".join(f"{use.name} at {use.scale:g}" for use in request.lora)
    if not numbers or not weights_are_sound:
        return Internal("the model produced values that are not finite")
    blamed = dict(sorted(numbers.items(), key=lambda one: (_magnitude(one[1]) or 0) <= _HUGE))
    return InvalidRequest(
        f"with {_listed(blamed)} the model comes to values that are not finite (NaN or infinity); give others",
        field=next(iter(blamed)),
    )


def _refused(error: Exception, given: dict[str, Any]) -> InvalidRequest:
    text = next(iter(str(error).strip().splitlines()), "")
    names = set(re.findall(r"\w+", text))
    blamed = {name: value for name, value in given.items() if name.removeprefix("extra.") in names} or given
    harmless = text.isprintable() and not _PRIVATE.search(text)
    reason = f"{type(error).__name__}: {text[:_LONGEST_REASON]}" if text and harmless else type(error).__name__
    return InvalidRequest(f"the pipeline could not use {_listed(blamed)} ({reason})", field=next(iter(blamed)))


def _given(request: Generate) -> Iterator[tuple[str, Any]]:
    """The fields that ``request`` gave, except prompts and seeds, the most unusual first."""
    yield from ((f"extra.{name}", value) for name, value in sorted(request.extra.items()))
    rollout = request.rollout
    if rollout is not None:
        if rollout.initial_noise:
            yield "initial_noise", f"{len(rollout.initial_noise)} tensors"
        if rollout.sigmas is not None:
            yield "sigmas", rollout.sigmas
        yield "rollout_noise_level", rollout.noise_level
    if request.images:
        yield "image", ", ".join(f"{image.width} x {image.height}" for image in request.images)
    yield from ((name, value) for name in OF_PIPELINES if (value := getattr(request, name)) is not None)


def _magnitude(value: Any) -> float | None:
    """The absolute value of the largest number in ``value``; ``None`` if there is none."""
    if isinstance(value, list):
        found = [one for one in map(_magnitude, value) if one is not None]
        return max(found, default=None)
    return abs(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _listed(given: dict[str, Any]) -> str:
    shown = [f"{name} = {_shortened(value)}" for name, value in list(given.items())[:_MOST_NAMED]]
    return ", ".join(shown) + (", …" if len(given) > _MOST_NAMED else "")


def _shortened(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _is_of_the_libraries(error: Exception) -> bool:
    """True if the innermost frame of the traceback, among the libraries' and ours, is a library's."""
    if isinstance(error, NothingMade):
        return True
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    worker = __package__.rpartition(".")[0]
    between = tuple(f"{worker}.{name}" for name in _BETWEEN)
    packages = [module.partition(".")[0] for module in modules if not module.startswith(between)]
    innermost = next((package for package in reversed(packages) if package in (_OURS, *_LIBRARIES)), _OURS)
    return innermost != _OURS


def _says(error: BaseException, words: re.Pattern[str]) -> bool:
    return isinstance(error, RuntimeError) and words.search(str(error)) is not None


def drop_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error that was dealt with.

    Their frames hold the pipeline's latents, and refer to the error in turn, so that only the garbage collector would
    free them.
    """
    seen: set[int] = set()
    rest: list[BaseException | None] = [error]
    while rest:
        one = rest.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            rest += [one.__cause__, one.__context__]
