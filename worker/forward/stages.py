"""The stages around a component's call. To add one, write a class here and list it in :func:`stages`.

A stage that has state takes it from :class:`ForwardResources`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_dispatch import attention_backend

from ..crossing.random_state import has_drawn, kept_random_state, random_state
from ..crossing.thread_state import within
from .activity import Activity
from .adapters import Adapters
from .at_rest import AtRest
from .batch import Forward
from .compiled import Compiled
from .prompt_cache import PromptCache, prompt_of
from .resources import ForwardResources
from .runner import Stage

Proceed = Callable[[], list[Any]]


class DrawsRandomNumbers(Exception):
    """A merged forward drew random numbers, which belong to a single request."""


def stages(resources: ForwardResources) -> list[Stage]:
    """The stages of ``resources``, the outermost first."""
    return [
        *([] if resources.activity is None else [Reporting(resources.activity)]),
        RandomNumbers(),
        *([] if resources.cache is None else [PromptCaching(resources.cache)]),
        *([] if resources.at_rest is None else [Restoring(resources.at_rest)]),
        *([] if resources.tiling is None else [resources.tiling]),
        Settings(),
        *([] if resources.plain_attention is None else [PlainAttention(resources.plain_attention)]),
        *([] if resources.offload is None else [resources.offload]),
        *([] if resources.adapters is None else [Adapting(resources.adapters)]),
        *([] if resources.timing is None else [resources.timing]),
        *([] if resources.compiled is None else [Compiling(resources.compiled)]),
        *([] if resources.graphs is None else [resources.graphs]),
    ]


class Reporting:
    """Lets heartbeats report that a forward is running."""

    name = "heartbeat"

    def __init__(self, activity: Activity) -> None:
        self._activity = activity

    def __call__(self, forward: Forward, proceed: Proceed) -> list[Any]:
        with self._activity.forward():
            return proceed()


class RandomNumbers:
    """Runs a call with its request's own random state; a merged forward, a part and a probe must leave it alone."""

    name = "random numbers"

    def __call__(self, forward: Forward, proceed: Proceed) -> list[Any]:
        if not (forward.merged or forward.part or forward.probe):
            return forward.calls[0].coroutine.with_own_random_numbers(proceed)
        with kept_random_state() as before:
            answers = proceed()
            if has_drawn(before) and not forward.probe:
                raise DrawsRandomNumbers
            return answers


class PromptCaching:
    """Answers text encoder calls from the prompt cache."""

    name = "prompt cache"

    def __init__(self, cache: PromptCache) -> None:
        self._cache = cache

    def __call__(self, forward: Forward, proceed: Proceed) -> list[Any]:
        if forward.probe or forward.calls[0].prompt is None:
            return proceed()
        known = None if forward.merged else self._get(forward)
        if known is not None:
            return [known]
        before = random_state()
        answers = proceed()
        if not has_drawn(before):
            for pending, uses, answer in zip(forward.calls, forward.adapters, answers, strict=True):
                self._cache.put(prompt_of(pending, uses), answer, exact=self._cache.is_exact(forward))
        return answers

    def _get(self, forward: Forward) -> Any | None:
        pending = forward.calls[0]
        return self._cache.get(
            prompt_of(pending, forward.adapters[0]), exact=self._cache.needs_exact(pending.coroutine)
        )


class Restoring:
    """Restores a component's attributes after a forward that failed halfway."""

    name = "restore after a failure"

    def __init__(self, at_rest: AtRest) -> None:
        self._at_rest = at_rest

    def __call__(self, forward: Forward, proceed: Proceed) -> list[Any]:
        try:
            return proceed()
        except BaseException:
            self._at_rest.restore(forward.component.partition(".")[0])
            raise


class Settings:
    """Runs a forward with torch's settings of its request."""

    name = "torch settings"

    def __call__(self, forward: Forward, proceed: Proceed) -> list[Any]:
        if forward.state is None:
            return proceed()
        with within(forward.state):
            return proceed()


class PlainAttention:
    """Runs deterministic requests with the attention ``backend`` of plain diffusers."""

    name = "plain attention"

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __call__(self, forward: Forward, proceed: Proceed) -> list[Any]:
        if not forward.calls[0].coroutine.plain:
            return proceed()
        with attention_backend(self._backend):
            return proceed()


class Adapting:
    """Applies each call's adapters to its rows."""

    name = "adapters"

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters

    def __call__(self, forward: Forward, proceed: Proceed) -> list[Any]:
        first = forward.calls[0].batchable
        rows = [
            (1 if pending.batchable is None else pending.batchable.rows, uses)
            for pending, uses in zip(forward.calls, forward.adapters, strict=True)
        ]
        with self._adapters.applied(forward.component, rows, listed=first is not None and first.listed):
            return proceed()


class Compiling:
    """Runs what was compiled of the component; deterministic requests run the component as it is."""

    name = "compiled blocks"

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled

    def __call__(self, forward: Forward, proceed: Proceed) -> list[Any]:
        if forward.probe or forward.calls[0].coroutine.plain:
            return proceed()
        with self._compiled.active(forward.component.partition(".")[0]):
            return proceed()
