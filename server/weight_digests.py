"""The post-training routes for digests of the weights that serve."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Request

from ..protocol.errors import Internal, InvalidRequest
from ..protocol.operations import CheckTensors, Digests
from ..protocol.reports import Operated, Report
from . import weight_bodies as bodies
from .operation_client import OperationClient, first_report, success
from .routes import Route, routes_of
from .service import Service


def routes(service: Service) -> APIRouter:
    return routes_of(_Routes(service).table())


class _Routes:
    def __init__(self, service: Service) -> None:
        self._operations = OperationClient(service)

    def table(self) -> list[Route[Any]]:
        return [
            Route(
                path="/update_weights_from_tensor_checker", handler=self.check, body=bodies.Checker,
                summary="Compare tensors with digests", max_values=bodies.TENSORS,
                answer="`missing` and `mismatched`, which are empty, `left_out`, and `weight_version`",
            ),
            Route(
                path="/get_weights_checksum", handler=self.checksum, body=bodies.Checksum,
                summary="SHA-256 of the weights that serve",
                answer="A digest for each module; in detail `modules` with every tensor, and `weight_version`",
            ),
        ]  # fmt: skip

    async def check(self, request: Request, body: bodies.Checker) -> dict[str, Any]:
        expected = body.digests
        if not expected:
            raise InvalidRequest(
                "Give expected_named_tensors_sha256, with at least one tensor.", field="expected_named_tensors_sha256"
            )
        operated = await self._operations.operate(request, CheckTensors(body.target_module, expected))
        left_out = first_report(operated).left_out
        return {
            **success(f"All of {len(expected) - len(left_out)} tensors match."),
            "missing": [],
            "mismatched": [],
            "left_out": left_out,
            **self._operations.version(operated),
        }

    async def checksum(self, request: Request, body: bodies.Checksum) -> dict[str, Any]:
        operated = await self._operations.operate(request, Digests(body.module_names, body.detail))
        report = _the_same(operated)
        if not body.detail:
            absent = [name for name in body.module_names or () if name not in report.digests]
            return {**report.digests, **dict.fromkeys(absent, "not_found")}
        modules = {
            name: {
                "sha256": digest,
                "tensors": msgspec.to_builtins(report.tensors.get(name, {})),
                "aliases": report.aliases.get(name, {}),
                "ignored": report.ignored.get(name, []),
            }
            for name, digest in report.digests.items()
        }
        return {"modules": modules, "weight_version": report.weight_version}


def _the_same(operated: Operated) -> Report:
    """The digests on which all replicas agree. Raises ``Internal``, which names a replica that differs."""
    first = first_report(operated)
    for number, report in operated.reports.items():
        for module, digest in report.digests.items():
            if digest != first.digests.get(module):
                raise Internal(f"Replica {number} has other weights in {module} than replica {min(operated.reports)}.")
    return first
