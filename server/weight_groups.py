"""The post-training routes for a trainer's process group and what it broadcasts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ..protocol.errors import ClientGone, InvalidRequest, SafelightError
from ..protocol.operations import Join, Leave
from ..protocol.tensor_sources import Broadcast
from . import weight_bodies as bodies
from .operation_client import OperationClient, success
from .routes import Route, routes_of
from .service import Service
from .subscription import OperationFailed
from .weight_writing import UPDATED, WeightWriting

_TIMEOUT_S = 60.0


def routes(service: Service) -> APIRouter:
    return routes_of(GroupRoutes(service).table())


class GroupRoutes:
    """The handlers of the routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._operations = OperationClient(service)
        self._writing = WeightWriting(service, self._operations)

    def table(self) -> list[Route[Any]]:
        return [
            Route(
                path="/init_weights_update_group", handler=self.init_group, body=bodies.InitGroup, answer="`ranks`",
                summary="Join the trainer's process group",
            ),
            Route(
                path="/update_weights_from_distributed", handler=self.from_distributed, body=bodies.FromDistributed,
                summary="Write what the trainer broadcasts", answer=UPDATED, max_values=bodies.TENSORS,
                refused=lambda raw: self._end_group(bodies.group_of(raw)),
            ),
            Route(
                path="/destroy_weights_update_group", handler=self.destroy_group, body=bodies.DestroyGroup,
                summary="Leave the trainer's process group",
            ),
        ]  # fmt: skip

    async def init_group(self, request: Request, body: bodies.InitGroup) -> dict[str, Any]:
        config = self._service.config
        members = config.world_size
        if body.rank_offset + members > body.world_size:
            raise InvalidRequest(
                f"A world of {body.world_size} has no room for the {members} ranks of this server, which begin at "
                f"rank_offset {body.rank_offset}: each rank of each replica is a member, and so is the trainer.",
                field="world_size",
            )
        longest_s = config.stall_timeout_s / 2
        if body.timeout_s is not None and body.timeout_s > longest_s:
            raise InvalidRequest(
                f"timeout_s can be at most {longest_s:g}, half of the server's --stall-timeout-s.", field="timeout_s"
            )
        operation = Join(
            address=body.master_address,
            port=body.master_port,
            rank_offset=body.rank_offset,
            world_size=body.world_size,
            group=body.group_name,
            backend=body.backend,
            timeout_s=body.timeout_s or min(_TIMEOUT_S, longest_s),
        )
        operated = await self._operations.operate(request, operation)
        ranks = sum(report.ranks for report in operated.reports.values())
        joined = f"{ranks} ranks have joined the group."
        if body.backend == "nccl":
            joined = f"{ranks} ranks have reached the group's store; over NCCL members meet in the first broadcast."
        return {**success(joined), "ranks": ranks}

    async def from_distributed(self, request: Request, body: bodies.FromDistributed) -> dict[str, Any]:
        """A trainer that is refused here may have begun to broadcast: the end of the group tells it."""
        try:
            return await self._receive(request, body)
        except ClientGone:
            raise
        except (SafelightError, OperationFailed):
            self._end_group(body.group_name)
            raise

    async def _receive(self, request: Request, body: bodies.FromDistributed) -> dict[str, Any]:
        targets = body.target_modules or ["transformer"]
        if len(targets) != 1:
            raise InvalidRequest("One call is for one module; the group was destroyed.", field="target_modules")
        source = Broadcast(body.group_name, targets[0], list(body.names), body.dtypes, body.shapes)
        if body.weight_update_mode == "lora_merge":
            return await self._writing.merge(request, source, targets[0], body)
        return await self._writing.update(request, source, body)

    def _end_group(self, name: str | None) -> None:
        """All groups where a body does not tell which it is about."""
        self._operations.without_reply(Leave(name))

    async def destroy_group(self, request: Request, body: bodies.DestroyGroup) -> dict[str, Any]:
        operated = await self._operations.operate(request, Leave(body.group_name))
        if not any(report.left for report in operated.reports.values()):
            return success(f"There is no group {body.group_name!r}; nothing was done.")
        return success("The ranks have left the group.")
