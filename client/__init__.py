"""The Python client: sync and async, with typed results, typed errors, streaming and retries."""

from ..protocol.errors import (
    BodyTooLarge,
    Conflict,
    DeadlinePassed,
    Forbidden,
    Internal,
    InvalidRequest,
    Malformed,
    NotFound,
    QueueFull,
    SafelightError,
    Unauthorized,
    Unavailable,
)
from .async_client import AsyncClient
from .errors import ConnectionLost, Unreachable
from .results import Event, Generation, Health, Output, Preview, Progress, Queued, Result
from .retry import Retries
from .sync_client import Client

__all__ = [
    "AsyncClient",
    "BodyTooLarge",
    "Client",
    "Conflict",
    "ConnectionLost",
    "DeadlinePassed",
    "Event",
    "Forbidden",
    "Generation",
    "Health",
    "Internal",
    "InvalidRequest",
    "Malformed",
    "NotFound",
    "Output",
    "Preview",
    "Progress",
    "QueueFull",
    "Queued",
    "Result",
    "Retries",
    "SafelightError",
    "Unauthorized",
    "Unavailable",
    "Unreachable",
]
