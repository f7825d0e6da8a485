"""An update of several parts, which serve together when it is committed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..protocol.adapters import SENT
from ..protocol.errors import InvalidRequest
from .named_tensors import NamedTensors
from .results import WeightUpdate
from .transports import TransportName
from .weight_api import Dtypes, WeightApi
from .weight_upload import BUCKET_BYTES, OnProgress, UploadJob, upload_job

DENOISER = "transformer"


class BegunUpdate:
    """An update that :meth:`Weights.begin` began; leaving its context commits the parts."""

    def __init__(
        self,
        api: WeightApi,
        fields: Mapping[str, Any],
        modules: Sequence[str],
        dtypes: Mapping[str, Dtypes] | None,
    ) -> None:
        self.result: WeightUpdate | None = None
        """Set once the update is committed; ``None`` on ranks that do not send."""
        self.digests: dict[str, dict[str, str]] = {}
        """Digests of the tensors sent, by module."""
        self.adapters: set[str] = set()
        """The nicknames of the adapters sent."""
        self._api = api
        self._fields = fields
        self._modules = modules
        self._dtypes = dtypes

    def update(
        self,
        named_tensors: NamedTensors,
        *,
        target_module: str = DENOISER,
        on_progress: OnProgress | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        route: TransportName | None = None,
    ) -> None:
        """Write a part, with the arguments and errors of :meth:`Weights.update`; later parts may overwrite it."""
        with upload_job(named_tensors, target_module, on_progress, bucket_bytes, route) as job:
            if job is not None:
                self.send(job)

    def update_lora(
        self,
        named_tensors: NamedTensors,
        *,
        target_module: str = DENOISER,
        alpha: float | None = None,
        rank: int | None = None,
        on_progress: OnProgress | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        route: TransportName | None = None,
    ) -> None:
        """Add layers to an adapter, with the arguments of :meth:`Weights.update_lora`; the commit merges it."""
        with upload_job(named_tensors, target_module, on_progress, bucket_bytes, route) as job:
            if job is not None:
                self.send_lora(job, alpha, rank)

    def send_lora(self, job: UploadJob, alpha: float | None, rank: int | None) -> None:
        self._check_module(job.module)
        self.adapters.add(sent_nickname(job.module))
        self._api.send(job, {**self._fields, **lora_fields(alpha, rank)}, None)

    def _check_module(self, module: str) -> None:
        if module not in self._modules:
            raise InvalidRequest(
                f"This update was begun for {', '.join(self._modules)}: name {module} in begin(modules=[…])."
            )

    def send(self, job: UploadJob) -> None:
        self._check_module(job.module)
        dtypes = None if self._dtypes is None else self._dtypes[job.module]
        _, hashed = self._api.send(job, self._fields, dtypes)
        if hashed:
            self.digests.setdefault(job.module, {}).update(hashed)


def sent_nickname(module: str) -> str:
    """The nickname that the server gives to an adapter sent as tensors."""
    return f"{SENT}:{module}"


def lora_fields(alpha: float | None, rank: int | None) -> dict[str, Any]:
    fields = {"weight_update_mode": "lora_merge", "lora_alpha": alpha, "lora_rank": rank}
    return {name: value for name, value in fields.items() if value is not None}
