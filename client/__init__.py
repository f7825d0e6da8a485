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
from .adapter_warning import OffPolicy
from .async_client import AsyncClient
from .async_weights import AsyncBegunUpdate, AsyncWeights
from .begun_update import BegunUpdate
from .encode_calls import EncodedPrompt, Encoding
from .errors import ConnectionLost, InvalidTensor, TensorsDiffer, TensorsRejected, Unreachable
from .results import (
    ActiveLora,
    Event,
    Generation,
    Health,
    LoadedLora,
    Loras,
    Output,
    Preview,
    Progress,
    Queued,
    Result,
    UpdateProgress,
    WeightUpdate,
)
from .retry import Retries
from .sync_client import Client
from .weights import Weights

__all__ = [
    "ActiveLora", "AsyncBegunUpdate", "AsyncClient", "AsyncWeights", "BegunUpdate", "BodyTooLarge", "Client",
    "Conflict", "ConnectionLost", "DeadlinePassed", "EncodedPrompt", "Encoding", "Event", "Forbidden", "Generation",
    "Health", "Internal", "InvalidRequest", "InvalidTensor", "LoadedLora", "Loras", "Malformed", "NotFound",
    "OffPolicy", "Output", "Preview", "Progress", "QueueFull", "Queued", "Result", "Retries", "SafelightError",
    "TensorsDiffer", "TensorsRejected", "Unauthorized", "Unavailable", "Unreachable", "UpdateProgress",
    "WeightUpdate", "Weights",
]  # fmt: skip
