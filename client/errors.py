"""What can go wrong between this program and a server, as the typed exceptions that the server itself uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import msgspec

from ..protocol.errors import (
    BodyTooLarge,
    Conflict,
    DeadlinePassed,
    ErrorInfo,
    Forbidden,
    Internal,
    InvalidRequest,
    Malformed,
    NotFound,
    QueueFull,
    SafelightError,
    Unauthorized,
    Unavailable,
    from_info,
)

_BY_STATUS: dict[int, type[SafelightError]] = {
    cls.status: cls
    for cls in (
        InvalidRequest, Unauthorized, Forbidden, NotFound, Conflict, BodyTooLarge, Malformed, QueueFull, Unavailable,
        DeadlinePassed,
    )
}  # fmt: skip


class Unreachable(Unavailable):
    """Nothing accepts connections at the address."""


class ConnectionLost(Unavailable):
    """The connection ended before the answer was complete; whether the work was done is not known."""


class InvalidTensor(msgspec.Struct, frozen=True):
    """A tensor that the server's model cannot take, and why."""

    name: str
    reason: str


class TensorsRejected(InvalidRequest):
    """Nothing was written: the model has no tensors ``unknown``, or cannot take what was sent for ``invalid``.

    Both lists end after some names; the message has how many there are.
    """

    def __init__(self, message: str, unknown: list[str], invalid: list[InvalidTensor]) -> None:
        super().__init__(message)
        self.unknown = unknown
        self.invalid = invalid


class TensorsDiffer(SafelightError):
    """The server holds other bytes than it should in ``mismatched``, and has no tensors ``missing``."""

    code, status = "invalid_request", 400

    def __init__(self, message: str, missing: list[str], mismatched: list[str]) -> None:
        super().__init__(message)
        self.missing = missing
        self.mismatched = mismatched


class _Body(msgspec.Struct):
    """The ``error`` object of a reply or of an ``error`` event; what a proxy may leave out has a default."""

    message: str
    code: str = ""
    field: str | None = None
    request_id: str | None = None
    retry_after_s: float | None = None


class _Envelope(msgspec.Struct):
    """The body of an error, with what the routes for weights put beside it."""

    error: _Body
    unknown: list[str] = []
    invalid: list[InvalidTensor] = []
    missing: list[str] = []
    mismatched: list[str] = []


def error_from_reply(status: int, headers: Mapping[str, str], content: bytes) -> SafelightError:
    """The exception for a reply of ``status`` 400 or more, whoever sent it."""
    retry_after_s = retry_after(headers.get("retry-after"))
    reply = _read(content)
    if reply is None:
        return _of_status(status)(f"The server answered {status} without saying why.", retry_after_s=retry_after_s)
    error = error_from_body(reply.error, status)
    if reply.unknown or reply.invalid:
        return TensorsRejected(error.message, reply.unknown, reply.invalid)
    if reply.missing or reply.mismatched:
        return TensorsDiffer(error.message, reply.missing, reply.mismatched)
    error.retry_after_s = retry_after_s
    return error


def error_from_event(data: str) -> SafelightError:
    """The exception for an ``error`` event of a stream."""
    reply = _read(data.encode())
    if reply is None:
        return Internal(f"The server sent an error that cannot be read: {data[:200]}")
    return error_from_body(reply.error)


def error_from_body(body: _Body, status: int = 500) -> SafelightError:
    """The exception that ``body`` names by its code; of a code that is not ours, the one of ``status``."""
    message = f"{body.message} (request {body.request_id})" if body.request_id else body.message
    error = from_info(ErrorInfo(body.code, message, status, body.field, body.retry_after_s))
    if error.code == body.code:
        return error
    return _of_status(status)(message, field=body.field, retry_after_s=body.retry_after_s)


def message_of(content: bytes) -> str | None:
    """What an error reply says, without the request's id."""
    reply = _read(content)
    return None if reply is None else reply.error.message


def retry_after(value: str | None) -> float | None:
    """Seconds in a ``Retry-After`` header, which holds seconds or a date (RFC 9110, 10.2.3); None for anything else."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):  # no date, or a date without a zone
        return None


@contextmanager
def transport_errors(url: str) -> Iterator[None]:
    """Translate httpx's exceptions within into ours; ``url`` is the server's."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unreachable(f"Nothing answers at {url}: start a server with `safelight serve`.") from error
    except httpx.TimeoutException as error:
        raise DeadlinePassed(f"{url} did not answer in time: give the client a longer `timeout`.") from error
    except httpx.TransportError as error:
        raise ConnectionLost(f"The connection to {url} ended before the answer was complete: {error}.") from error


def decode(content: bytes | str, kind: Any, url: str) -> Any:  # Any: msgspec takes every type
    """``content`` as ``kind``. Raises ``Internal`` when it is none, as when something else listens at ``url``."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise Internal(f"What answers at {url} does not speak as a Safelight server does: {error}.") from None


def _of_status(status: int) -> type[SafelightError]:
    return _BY_STATUS.get(status, Internal)


def _read(content: bytes) -> _Envelope | None:
    try:
        return msgspec.json.decode(content, type=_Envelope)
    except msgspec.DecodeError:
        return None
