"""The requests of a client, built without a connection; the sync and async clients send them."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Concatenate, ParamSpec, TypeVar

from ..protocol.errors import InvalidRequest
from ..protocol.output_formats import OutputFormat
from .pictures import Picture, encode_pictures
from .request_fields import by_table, shows_fields

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")

GRACE_S = 30.0
"""Seconds after a request's own timeout in which its 504 may arrive."""

LOOK_S = 10.0
"""Seconds that a GET may take: the server has its answer at hand."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request. ``timeout_s`` is the request's own timeout, if it has one.

    ``again`` allows a retry after the server has refused the request without doing any work.
    """

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    timeout_s: float | None = None
    again: bool = True

    def streaming(self) -> Call:
        """The same request, answered with server-sent events."""
        return replace(self, body={**(self.body or {}), "stream": True})

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.body is None else {"content-type": "application/json"}

    @property
    def content(self) -> bytes | Iterable[bytes] | None:
        """The body as JSON. Raises ``InvalidRequest`` for values that JSON cannot express."""
        if self.body is None:
            return None
        try:
            return json.dumps(self.body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"The request cannot be written as JSON: {error}.") from None

    def read_timeout(self, default: float | None) -> float | None:
        """Seconds to wait for the server's next bytes: ``default``, or longer if the request's own timeout is."""
        if default is None:
            return None
        if self.method == "GET":
            return min(default, LOOK_S)
        return default if self.timeout_s is None else max(default, self.timeout_s + GRACE_S)


HEALTH = Call("GET", "/health")
SERVER_INFO = Call("GET", "/server_info")
MODEL_INFO = Call("GET", "/model_info")


@shows_fields
def generate(
    prompt: str | Sequence[str],
    *,
    seed: int | Sequence[int] | None = None,
    n: int | None = None,
    image: Picture | Sequence[Picture] | None = None,
    lora: Sequence[Mapping[str, Any]] | None = None,
    output_format: OutputFormat | None = None,
    extra: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Call:
    """The request for pictures or clips. The server chooses values for ``None``; ``steps`` is short for
    ``num_inference_steps``; arguments that are not request fields go to the pipeline's ``__call__``."""
    settings, further = by_table(arguments)
    fields: dict[str, Any] = {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "seed": list(seed) if isinstance(seed, Sequence) else seed,
        "n": n,
        "image": None if image is None else encode_pictures(image),
        "lora": None if lora is None else [dict(adapter) for adapter in lora],
        "output_format": output_format,
        "extra": {**(extra or {}), **further} or None,
    }
    body = {name: value for name, value in fields.items() if value is not None} | settings
    return Call("POST", "/generate", body, settings.get("timeout_s"))


def with_arguments_of(
    build: Callable[P, Call],
) -> Callable[[Callable[[S, Call], R]], Callable[Concatenate[S, P], R]]:
    """Give a method that takes a :class:`Call` the arguments of ``build``, which declares them once."""

    def decorate(method: Callable[[S, Call], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def send(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            return method(self, build(*args, **kwargs))

        arguments = inspect.signature(build)
        owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        vars(send)["__signature__"] = inspect.signature(method).replace(
            parameters=[owner, *arguments.parameters.values()]
        )
        return send

    return decorate
