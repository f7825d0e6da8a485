"""The four phases of vLLM's interface for training: the transactions of this server under its names.

A trainer joins a process group (``/init_weight_transfer_engine``), and for each of its versions begins an update, sends
tensors over the group and commits. There is one group and one update at a time, which the server remembers.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ..protocol.errors import InvalidRequest, NotFound
from ..protocol.operations import Abort, Barrier, Leave, Pause
from . import weight_bodies as bodies
from .generation_control import GenerationControl
from .operating import Handler, Operating, routes_of
from .scheduler_link import OperationFailed
from .service import Service
from .weights import Weights

GROUP = "weight_transfer"
_MODES: dict[str, Barrier] = {"keep": "in_place", "wait": "wait", "abort": "abort"}


def routes(service: Service, weights: Weights) -> APIRouter:
    handlers = _Routes(service, weights)
    router = routes_of(handlers.table())
    questions: list[tuple[str, Handler, str]] = [
        ("/is_paused", handlers.is_paused, "Whether generation is paused, or the server asleep"),
        ("/get_world_size", handlers.world_size, "How many ranks join a trainer's process group"),
    ]
    router.include_router(routes_of(questions, "GET"))
    return router


class _Routes:
    def __init__(self, service: Service, weights: Weights) -> None:
        self._service = service
        self._weights = weights
        self._operating = Operating(service)
        self._update_id: str | None = None

    def table(self) -> list[tuple[str, Handler, str]]:
        return [
            ("/pause", self.pause, "Stop generation; requests wait (mode keep or wait) or are ended (abort)"),
            ("/resume", self.resume, "Go on"),
            ("/init_weight_transfer_engine", self.join, "Join the trainer's process group"),
            ("/start_weight_update", self.start, "Begin an update"),
            ("/update_weights", self.update, "Write what the trainer broadcasts"),
            ("/finish_weight_update", self.finish, "End the update, so that its weights serve"),
        ]
