"""The HTTP application: every route, and the layers around them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from .. import __version__
from ..protocol.config import Config
from ..protocol.errors import ErrorInfo
from . import (
    adapters,
    encode,
    engine_control,
    generate,
    health,
    information,
    metrics,
    reference,
    rollout,
    trainer_calls,
    weight_digests,
    weight_groups,
    weight_transfer,
    weights,
)
from .answers import error_schemas
from .auth import ApiKeyMiddleware
from .body import FORM
from .body_limit import BodyLimitMiddleware, BodyLimits, BodyMemory
from .callers import Callers, CallersMiddleware, CorsMiddleware
from .replies import error_reply
from .request_context import RequestContextMiddleware
from .rollout_reply import MEDIA_TYPE
from .service import Service

OWN_TYPES = {
    "/generate": FORM,
    "/update_weights_from_tensor": weights.SAFETENSORS,
    "/rollout/generate": MEDIA_TYPE,
}
"""The media type that a route's body may have besides JSON."""

CHANGING_GETS = frozenset({"/flush_cache"})

_MB = 1_000_000
_LARGE = ("/generate", "/rollout/generate", "/update_weights_from_tensor")
"""Routes whose bodies contain pictures or tensors."""

_LISTS = ("/update_weights_from_tensor_checker", "/update_weights_from_distributed", "/update_weights")
"""Routes whose bodies name every tensor of a model."""

_CODES = {404: "not_found", 405: "method_not_allowed"}


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        found = super().openapi()
        found.setdefault("components", {}).setdefault("schemas", {}).update(error_schemas())
        return found


def create_app(service: Service) -> FastAPI:
    """The application of ``service``. A request passes the middlewares from the last one added to the first."""
    callers = Callers.of(service.config, OWN_TYPES, CHANGING_GETS)
    app = _Application(title="Safelight", version=__version__, redirect_slashes=False, docs_url=None, redoc_url=None)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(
        BodyLimitMiddleware,
        limits=_body_limits(service.config),
        memory=BodyMemory(service.config.max_bodies_mb * _MB),
        timeout_s=service.config.body_timeout_s,
    )
    app.add_middleware(ApiKeyMiddleware, api_key=service.config.api_key)
    app.add_middleware(CallersMiddleware, callers=callers)
    app.add_middleware(RequestContextMiddleware, metrics=service.metrics)
    app.add_middleware(CorsMiddleware, origins=callers.origins)
    app.include_router(generate.routes(service))
    app.include_router(encode.routes(service))
    app.include_router(rollout.routes(service))
    app.include_router(health.routes(service))
    app.include_router(information.routes(service))
    app.include_router(adapters.reading_routes(service))
    app.include_router(weight_transfer.reading_routes(service))
    if service.config.admin:
        app.include_router(adapters.routes(service))
        app.include_router(weights.routes(service))
        app.include_router(weight_groups.routes(service))
        app.include_router(weight_digests.routes(service))
        app.include_router(engine_control.routes(service))
        app.include_router(trainer_calls.routes(service))
        app.include_router(weight_transfer.routes(service))
    app.include_router(metrics.routes(service.metrics))
    app.include_router(reference.routes())
    return app


def _body_limits(config: Config) -> BodyLimits:
    most = config.max_body_mb * _MB
    by_path = {**dict.fromkeys(_LARGE, most), **dict.fromkeys(_LISTS, min(most, 16 * _MB))}
    streamed = {("/update_weights_from_tensor", weights.SAFETENSORS): config.max_update_mb * _MB}
    return BodyLimits(min(most, _MB), by_path, streamed)


async def _http_error(request: Request, error: Exception) -> Response:
    """Reply to unknown paths and methods."""
    assert isinstance(error, HTTPException)
    status = error.status_code
    reasons = {404: "There is no such route", 405: f"This route does not take {request.method[:20]}"}
    message = f"{reasons.get(status, error.detail)}; /docs lists the routes."
    return error_reply(ErrorInfo(_CODES.get(status, "invalid_request"), message, status), error.headers)
