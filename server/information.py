"""Routes for information about the server and its model."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Response

from .. import __version__
from ..protocol.replicas import ReplicaStatus
from .answers import READING, answers
from .health import what_waits
from .operation_client import active_adapters
from .replies import json_reply
from .service import Service

_READ = answers("What the summary says", (503, *READING))


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["information"])

    @router.get("/get_server_info", include_in_schema=False)
    @router.get(
        "/server_info", summary="Version, configuration, replicas, how requests share forwards", responses=_READ
    )
    async def server_info() -> Response:
        return json_reply(_server_info(service))

    @router.get("/get_model_info", include_in_schema=False)
    @router.get("/model_info", summary="The model, its sizes, and the arguments that `extra` may hold", responses=_READ)
    async def model_info() -> Response:
        return json_reply(msgspec.to_builtins(service.model()))

    @router.get("/get_weight_version", summary="The version of the weights that serve now", responses=_READ)
    async def get_weight_version() -> Response:
        return json_reply({"weight_version": service.model().weight_version})

    return router


def _server_info(service: Service) -> dict[str, Any]:
    config: dict[str, Any] = msgspec.to_builtins(service.config)
    del config["api_key"]
    status = service.link.status
    models = {replica.model.model: replica.model for replica in status.replicas if replica.model is not None}
    model = service.link.model()
    return {
        "version": __version__,
        "uptime_s": round(service.uptime_s, 3),
        "config": config,
        "models": [msgspec.to_builtins(model) for model in models.values()],
        "batching": None if model is None else msgspec.to_builtins(model.batching),
        "queued": status.queued,
        "running": status.running,
        "queued_operations": status.queued_operations,
        "queued_bytes": status.queued_bytes,
        **{"halted": None, "hold": None, **what_waits(status)},
        "adapters": active_adapters(status.adapters),
        "world_size": service.config.world_size,
        "shared_memory": str(service.shared),
        "replicas": [_replica(replica) for replica in status.replicas],
    }


def _replica(replica: ReplicaStatus) -> dict[str, Any]:
    """The scheduler's view of it, with the model by name alone."""
    described: dict[str, Any] = msgspec.to_builtins(replica)
    described["model"] = None if replica.model is None else replica.model.model
    return described
