"""Routes for liveness and health."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Response

from ..protocol.errors import Unavailable
from ..protocol.replicas import ReplicaStatus, Status
from .answers import READING, answers
from .replies import error_reply, json_reply
from .service import Service

_HEALTH = answers("`status`, and `replicas` with the reason for each", (503, *READING))


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/liveness", summary="200 while this process is up", responses=answers("It is", READING))
    async def liveness() -> Response:
        return json_reply({"status": "alive"})

    @router.get("/health", summary="200 when a replica has finished a real forward and answers", responses=_HEALTH)
    @router.get("/health_generate", summary="The same as /health", responses=_HEALTH)
    async def health() -> Response:
        return _health(service)

    return router


def _health(service: Service) -> Response:
    replicas = service.link.status.replicas
    reasons = [_reason(replica) for replica in replicas]
    if replicas and not service.link.answers:
        error = Unavailable("The scheduler does not answer.")
        return error_reply(error.info(), status="unavailable", replicas=reasons)
    if any(replica.state == "ready" for replica in replicas):
        return json_reply({"status": "ok", "replicas": reasons, **what_waits(service.link.status)})
    starting = all(replica.state == "starting" for replica in replicas)
    error = service.link.unavailable()
    return error_reply(error.info(), status="starting" if starting else "unavailable", replicas=reasons)


def what_waits(status: Status) -> dict[str, Any]:
    """Why ready replicas start nothing, and since when: asleep or paused, or held back by an operation."""
    found: dict[str, Any] = {}
    if status.halted is not None:
        found |= {"halted": status.halted, "halted_s": round(status.halted_s, 3)}
    if status.hold is not None:
        hold: dict[str, Any] = msgspec.to_builtins(status.hold)
        found["hold"] = {name: round(value, 3) if isinstance(value, float) else value for name, value in hold.items()}
    return found


def _reason(replica: ReplicaStatus) -> dict[str, Any]:
    return {"replica": replica.replica, "state": replica.state, "message": replica.message}
