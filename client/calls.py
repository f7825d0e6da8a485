"""The requests of a client, built without a connection; the sync and async clients send them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from ..protocol.errors import InvalidRequest
from ..protocol.fields import TABLE, Table
from ..protocol.output_formats import OutputFormat
from .errors import decode
from .pictures import Picture, encode_pictures
from .results import Generation

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")
T = TypeVar("T")

GRACE_S = 30.0
"""Seconds after a request's own timeout in which its 504 may arrive."""

LOOK_S = 10.0
"""Seconds that a GET may take: the server has its answer at hand."""

_WHOLE = (str, bytes, bytearray, Mapping)
"""Iterables that are values of their own, not lists of values."""


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One HTTP request. ``timeout_s`` is the request's own timeout, if it has one.

    ``read`` makes the result of the reply's body and the server's address. ``again`` allows a retry after the server
    has refused the request without doing any work.
    """

    method: str
    path: str
    read: Callable[[bytes, str], R]
    body: Mapping[str, Any] | None = None
    timeout_s: float | None = None
    again: bool = True

    def streaming(self) -> Call[R]:
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
            return json.dumps(self.body, allow_nan=False, default=_number).encode()
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"The request cannot be written as JSON: {error}.") from None

    def read_timeout(self, default: float | None) -> float | None:
        """Seconds to wait for the server's next bytes: ``default``, or longer if the request's own timeout is."""
        if default is None:
            return None
        if self.method == "GET":
            return min(default, LOOK_S)
        return default if self.timeout_s is None else max(default, self.timeout_s + GRACE_S)


class Ask(Protocol):
    """Sends a call and returns its result."""

    def __call__(self, call: Call[R], /) -> R: ...


def nothing(reply: bytes, url: str) -> None:
    """Read a reply that says no more than its status."""


HEALTH = Call("GET", "/health", nothing)


def generate(
    prompt: str | Sequence[str], *, seed: int | Sequence[int] | None = None, n: int | None = None,
    image: Picture | Sequence[Picture] | None = None, lora: Sequence[Mapping[str, Any]] | None = None,
    output_format: OutputFormat | None = None, guidance_scale: float | None = None,
    true_cfg_scale: float | None = None, num_inference_steps: int | None = None, steps: int | None = None,
    width: int | None = None, height: int | None = None, num_frames: int | None = None, fps: int | None = None,
    negative_prompt: str | None = None, priority: int | None = None, timeout_s: float | None = None,
    preview_every: int | None = None, deterministic: bool | None = None, cache: str | float | None = None,
    extra: Mapping[str, Any] | None = None, **arguments: Any,
) -> Call[Generation]:  # fmt: skip
    """Generate pictures or clips from ``prompt`` and wait for them.

    ``steps`` is short for ``num_inference_steps``. The server chooses values for omitted arguments; arguments that are
    not named here go to the pipeline's ``__call__``.
    """
    fields = {
        **by_table(locals()),
        "prompt": prompt,
        "seed": seed,
        "n": n,
        "image": None if image is None else encode_pictures(image),
        "lora": None if lora is None else [dict(adapter) for adapter in lora],
        "output_format": output_format,
        "extra": {**(extra or {}), **arguments} or None,
    }
    return Call("POST", "/generate", partial(decode, Generation), given(fields), timeout_s)


def info() -> Call[dict[str, Any]]:
    """``/server_info``: version, configuration, replicas, and how requests share forwards."""
    return Call("GET", "/server_info", partial(decode, dict[str, Any]))


def model_info() -> Call[dict[str, Any]]:
    """``/model_info``: the model, its sizes, and the arguments of its pipeline."""
    return Call("GET", "/model_info", partial(decode, dict[str, Any]))


def by_table(arguments: Mapping[str, Any], table: Table = TABLE) -> dict[str, Any]:
    """The fields of ``table`` in ``arguments`` that are not ``None``, under their names in a request's body.

    Raises ``InvalidRequest`` for a field given under both of its names.
    """
    fields: dict[str, Any] = {}
    for row in table.values():
        values = given({name: arguments.get(name) for name in (row.name, row.alias)})
        if len(values) > 1:
            raise InvalidRequest(
                f"`{row.alias}` and `{row.name}` are the same field: give one of them.", field=row.alias
            )
        if values:
            _, fields[row.name] = values.popitem()
    return fields


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` as JSON has them, without those that are ``None``, whose values the server chooses."""
    return {
        name: list(value) if isinstance(value, Iterable) and not isinstance(value, _WHOLE) else value
        for name, value in fields.items()
        if value is not None
    }


def _number(value: object) -> int | float:
    """A number of another library, such as numpy's, as JSON has it."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} is not a type that JSON has")


def method(build: Callable[P, Call[R]], send: Callable[[S, Call[R]], T]) -> Callable[Concatenate[S, P], T]:
    """A client's method with the arguments of ``build`` that passes the call to ``send``.

    It belongs to the class of ``send``, and has the name and the docstring of ``send``, if that has one, else of
    ``build``; a traceback shows the name too.
    """
    call = _awaiting(build, send) if inspect.iscoroutinefunction(send) else _sending(build, send)
    built, sent = inspect.signature(build), inspect.signature(send)
    owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    returns = built.return_annotation[len("Call[") : -1] if sent.return_annotation == "R" else sent.return_annotation
    shown = built.replace(parameters=[owner, *built.parameters.values()], return_annotation=returns)
    vars(call)["__signature__"] = shown
    named = send if send.__doc__ else build
    call.__name__, call.__doc__ = named.__name__.removeprefix("_"), named.__doc__
    call.__qualname__ = f"{send.__qualname__.rpartition('.')[0]}.{call.__name__}"
    call.__module__ = send.__module__
    call.__code__ = call.__code__.replace(co_name=call.__name__, co_qualname=call.__qualname__)
    return call


def _sending(build: Callable[P, Call[R]], send: Callable[[S, Call[R]], T]) -> Callable[Concatenate[S, P], T]:
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return send(self, build(*args, **kwargs))

    return call


def _awaiting(
    build: Callable[P, Call[R]], send: Callable[[S, Call[R]], Awaitable[Any]]
) -> Callable[Concatenate[S, P], Any]:
    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return await send(self, build(*args, **kwargs))

    return call
