"""Errors of the client: HTTP errors as the server's own typed exceptions, and those of the transport."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx
import msgspec

from ..protocol.errors import (
    BY_STATUS,
    DeadlinePassed,
    ErrorInfo,
    Internal,
    InvalidRequest,
    SafelightError,
    Unavailable,
    from_info,
)

R = TypeVar("R")


class Unreachable(Unavailable):
    """Nothing accepts connections at the address."""


class ConnectionLost(Unavailable):
    """The connection ended before the reply was complete; the server may have done the work or not."""


class InvalidTensor(msgspec.Struct, frozen=True):
    """A tensor that the server's model cannot take, and the reason."""

    name: str
    reason: str


class TensorsRejected(InvalidRequest):
    """Nothing was written: the model has no tensors called ``unknown``, or cannot take those in ``invalid``.

    The server shortens both lists; the message has the full counts.
    """

    def __init__(self, message: str, unknown: list[str], invalid: list[InvalidTensor]) -> None:
        super().__init__(message)
        self.unknown = unknown
        self.invalid = invalid


class TensorsDiffer(SafelightError):
    """The server's bytes of the ``mismatched`` tensors differ, or the server has no tensors called ``missing``."""

    code, status = "invalid_request", 400

    def __init__(self, message: str, missing: list[str], mismatched: list[str]) -> None:
        super().__init__(message)
        self.missing = missing
        self.mismatched = mismatched


class _Body(msgspec.Struct):
    """The ``error`` object of a reply or of an ``error`` event; fields that a proxy may omit have defaults."""

    message: str
    code: str = ""
    field: str | None = None
    request_id: str | None = None
    retry_after_s: float | None = None


class _Envelope(msgspec.Struct):
    """The body of an error, with the fields that the routes for weights add."""

    error: _Body
    unknown: list[str] = []
    invalid: list[InvalidTensor] = []
    missing: list[str] = []
    mismatched: list[str] = []


def error_from_reply(status: int, headers: Mapping[str, str], content: bytes) -> SafelightError:
    """The exception for a reply of ``status`` 400 or more, from a Safelight server or a proxy."""
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
    reply = _read(data.encode())
    if reply is None:
        return Internal(f"The server sent an error that cannot be read: {data[:200]}")
    return error_from_body(reply.error)


def error_from_body(body: _Body, status: int = 500) -> SafelightError:
    """The exception of the code in ``body``; for an unknown code, that of ``status``."""
    message = f"{body.message} (request {body.request_id})" if body.request_id else body.message
    error = from_info(ErrorInfo(body.code, message, status, body.field, body.retry_after_s))
    if error.code == body.code:
        return error
    return _of_status(status)(message, field=body.field, retry_after_s=body.retry_after_s)


def message_of(content: bytes) -> str | None:
    """The message of an error reply, without the request's id."""
    reply = _read(content)
    return None if reply is None else reply.error.message


def retry_after(value: str | None) -> float | None:
    """The seconds of a ``Retry-After`` header, which has seconds or a date (RFC 9110, 10.2.3); else ``None``."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):  # not a date, or a date without a zone
        return None


@contextmanager
def transport_errors(url: str) -> Iterator[None]:
    """Translate httpx's exceptions into ours; ``url`` is the server's."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unreachable(f"Nothing answers at {url}: start a server with `safelight serve`.") from error
    except httpx.TimeoutException as error:
        raise DeadlinePassed(f"{url} did not answer in time: give the client a longer `timeout`.") from error
    except httpx.TransportError as error:
        raise ConnectionLost(f"The connection to {url} ended before the answer was complete: {error}.") from error


def decode(kind: type[R], content: bytes | str, url: str) -> R:
    """Decode ``content``. Raises ``Internal`` if it is not a ``kind``: another program may listen at ``url``."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise Internal(f"The reply from {url} is not that of a Safelight server: {error}.") from None


def _of_status(status: int) -> type[SafelightError]:
    return BY_STATUS.get(status, Internal)


def _read(content: bytes) -> _Envelope | None:
    try:
        return msgspec.json.decode(content, type=_Envelope)
    except msgspec.DecodeError:
        return None
