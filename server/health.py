"""Whether the process is up, and whether it can serve."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from ..protocol.errors import Unavailable
from ..protocol.messages import ReplicaStatus
from .replies import error_reply, json_reply
from .service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/liveness", summary="200 while this process is up")
    async def liveness() -> Response:
        return json_reply({"status": "alive"})

    @router.get("/health", summary="200 when a replica has finished a real forward and answers")
    @router.get("/health_generate", summary="The same as /health")
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
        halted = service.link.status.halted
        return json_reply({"status": "ok", "replicas": reasons, **({"halted": halted} if halted else {})})
    starting = all(replica.state == "starting" for replica in replicas)
    error = service.link.unavailable()
    return error_reply(error.info(), status="starting" if starting else "unavailable", replicas=reasons)


def _reason(replica: ReplicaStatus) -> dict[str, Any]:
    return {"replica": replica.replica, "state": replica.state, "message": replica.message}
