"""Update, verify and digest a server's weights."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, overload

from msgspec.structs import replace

from ..protocol.errors import NotFound
from ..protocol.operations import Barrier
from . import weight_calls
from .adapter_warning import warn_of_adapters
from .begun_update import DENOISER, BegunUpdate, lora_fields, sent_nickname
from .calls import Ask
from .checksum import ModuleChecksum
from .endpoint import Endpoint
from .named_tensors import NamedTensors, is_primary
from .results import WeightUpdate
from .transports import TransportName
from .weight_api import WeightApi
from .weight_upload import BUCKET_BYTES, OnProgress, UploadJob, digest_tensors, upload_job


class Weights:
    """The weights of one server; :attr:`Client.weights` is one. Every method raises what those of ``Client`` do.

    Tensors are given as ``named_tensors``: a module, a mapping or pairs of name and tensor, or the path of one module's
    safetensors files. They have the shapes of the checkpoint, however the server shards or fuses them; any floating
    dtype is cast to the parameter's, and any other dtype must equal it. A module may be compiled, or wrapped by DDP or
    FSDP. Where tensors are sharded over the ranks of a torch.distributed group (DTensors, FSDP), all ranks call the
    method: tensors are gathered one at a time, and only rank 0 sends them, raises errors and gets a result.
    """

    def __init__(self, endpoint: Endpoint, ask: Ask) -> None:
        self._ask = ask
        self._api = WeightApi(endpoint, ask)

    def update(
        self,
        named_tensors: NamedTensors,
        *,
        target_module: str = DENOISER,
        version: str | None = None,
        verify: bool = True,
        mode: Barrier = "wait",
        on_progress: OnProgress | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        route: TransportName | None = None,
        timeout_s: float = 300.0,
    ) -> WeightUpdate | None:
        """Write tensors, under their checkpoint names, into ``target_module``; all of them or none.

        Their memory is read until this method returns: do not change it, nor reuse it for the iterable's next pair.
        Tensors travel in buckets of ``bucket_bytes``, through shared memory where the server is on this machine, else
        over HTTP, or by ``route``. ``on_progress`` gets the bytes sent, and may be called from another thread. With
        ``verify``, digests of the server's tensors are compared with those of the tensors sent, after the commit.
        ``mode`` decides about requests that came earlier: they finish first (``wait``), are aborted (``abort``), or
        continue with the new weights (``in_place``). Warns ``OffPolicy`` where adapters are active, merged or dynamic.

        Raises ``TensorsRejected`` for names, shapes and dtypes that the model does not have, ``TensorsDiffer`` where
        the server's tensors differ, and ``ConnectionLost`` or ``DeadlinePassed`` without an answer: then
        :meth:`version` shows whether the update was committed.
        """
        with upload_job(named_tensors, target_module, on_progress, bucket_bytes, route) as job:
            if job is None:
                return None
            job, at_once = job.peeked("write")
            if at_once:
                return self._update_at_once(job, version, verify, mode)
            with self.begin(version, [target_module], mode, timeout_s, verify=verify) as begun:
                begun.send(job)
            return begun.result

    def _update_at_once(self, job: UploadJob, version: str | None, verify: bool, mode: Barrier) -> WeightUpdate:
        dtypes = self._api.dtypes([job.module])[job.module] if verify else None
        fields = {"mode": mode, **({} if version is None else {"weight_version": version})}
        began = time.monotonic()
        updated, hashed = self._api.send(job, fields, dtypes)
        updated = replace(updated, elapsed_s=time.monotonic() - began)
        if verify:
            self._api.check({job.module: hashed})
        warn_of_adapters(updated, stacklevel=3)
        return updated

    def update_lora(
        self,
        named_tensors: NamedTensors,
        *,
        target_module: str = DENOISER,
        alpha: float | None = None,
        rank: int | None = None,
        version: str | None = None,
        mode: Barrier = "wait",
        on_progress: OnProgress | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        route: TransportName | None = None,
        timeout_s: float = 300.0,
    ) -> WeightUpdate | None:
        """Merge a LoRA adapter's tensors into ``target_module``, in place of those that an earlier call merged.

        Names may have any format of adapter files, PEFT's and diffusers' too; ``alpha`` and ``rank`` apply to tensors
        without their own. All buckets are merged, or none, and they are not verified by digest. The server lists the
        adapter as ``lora_merge:transformer``; unmerging it restores the base's bytes. Raises ``InvalidRequest`` for
        tensors that are not an adapter of the module, and ``ConnectionLost`` or ``DeadlinePassed`` without an answer:
        then :meth:`version` shows whether the adapter was merged.
        """
        began = time.monotonic()
        with upload_job(named_tensors, target_module, on_progress, bucket_bytes, route) as job:
            if job is None:
                return None
            job, at_once = job.peeked("merge")
            if not at_once:
                with self.begin(version, [target_module], mode, timeout_s, verify=False) as begun:
                    begun.send_lora(job, alpha, rank)
                return begun.result
            alone = {"mode": mode, "lora_complete": True, **({} if version is None else {"weight_version": version})}
            updated, _ = self._api.send(job, {**lora_fields(alpha, rank), **alone}, None)
        updated = replace(updated, elapsed_s=time.monotonic() - began)
        warn_of_adapters(updated, [sent_nickname(target_module)], stacklevel=2)
        return updated

    @contextmanager
    def begin(
        self,
        version: str | None = None,
        modules: Sequence[str] | None = None,
        mode: Barrier = "wait",
        timeout_s: float = 300.0,
        *,
        verify: bool = True,
        require_complete: bool = False,
    ) -> Iterator[BegunUpdate]:
        """Begin an update of several parts to ``modules`` (by default the transformer), as a context.

        A clean exit commits the update and then verifies it; an exception aborts it and restores every byte. With
        ``require_complete``, ``InvalidRequest`` is raised unless every tensor of the modules was sent. Within the
        context the server answers only the update's own methods: generation and other calls about weights wait. The
        server aborts an update after ``timeout_s`` seconds without a finished part. All ranks of a trainer make the
        same calls in the context, and leave it together.
        """
        named = list(modules or [DENOISER])
        if not is_primary():
            yield BegunUpdate(self._api, {}, named, None)
            return
        dtypes = self._api.dtypes(named) if verify else None  # before the update blocks the server
        began = time.monotonic()
        update_id = self._ask(weight_calls.begin(version, named, mode, timeout_s)).update_id
        begun = BegunUpdate(self._api, {"update_id": update_id}, named, dtypes)
        try:
            yield begun
            committed = self._ask(weight_calls.commit(update_id, require_complete))
        except BaseException as error:
            self._api.abort(update_id, error)
            raise
        begun.result = replace(committed, elapsed_s=time.monotonic() - began)
        if verify:
            self._api.check(begun.digests)
        warn_of_adapters(committed, begun.adapters, stacklevel=3)

    def update_from_disk(
        self,
        path: str | Path,
        *,
        target_modules: Sequence[str] | None = None,
        version: str | None = None,
        mode: Barrier = "wait",
        require_complete: bool | None = None,
    ) -> WeightUpdate:
        """Have the server read safetensors files from ``path`` on its own machine.

        ``target_modules`` are modules of a pipeline's directory, by default all. ``require_complete`` demands every
        tensor of the modules; the default is true for a directory and false for a file. Raises ``InvalidRequest`` for
        missing files and for tensors that do not fit.
        """
        call = weight_calls.update_from_disk(
            path, target_modules=target_modules, version=version, mode=mode, require_complete=require_complete
        )
        updated = self._ask(call)
        warn_of_adapters(updated, stacklevel=2)
        return updated

    def verify(self, named_tensors: NamedTensors, *, target_module: str = DENOISER) -> None:
        """Compare the server's tensors with these. Raises ``TensorsDiffer``, which names the tensors that differ."""
        hashed: dict[str, str] = {}
        with upload_job(named_tensors, target_module) as job, ThreadPoolExecutor() as pool:
            if job is None:
                return
            dtypes = self._api.dtypes([target_module])[target_module]
            for bucket in job.buckets:
                hashed |= {name: one.result() for name, one in digest_tensors(bucket.tensors, dtypes, pool).items()}
        self._api.check({target_module: hashed})

    @overload
    def checksum(self, modules: Sequence[str] | None = None, *, detail: Literal[False] = False) -> dict[str, str]: ...

    @overload
    def checksum(self, modules: Sequence[str] | None = None, *, detail: Literal[True]) -> dict[str, ModuleChecksum]: ...

    def checksum(
        self, modules: Sequence[str] | None = None, *, detail: bool = False
    ) -> dict[str, str] | dict[str, ModuleChecksum]:
        """SHA-256 of each module in hex, with ``detail`` also of every tensor. Raises ``NotFound``."""
        if detail:
            detailed = self._ask(weight_calls.detailed_checksum(modules)).modules
            _refuse_absent(modules, detailed)
            return detailed
        digests = self._ask(weight_calls.checksum(modules))
        _refuse_absent(modules, {name for name, digest in digests.items() if digest != "not_found"})
        return digests

    def version(self) -> str:
        """The version of the weights that the server has now."""
        return self._ask(weight_calls.version()).weight_version


def _refuse_absent(wanted: Sequence[str] | None, found: Collection[str]) -> None:
    absent = [name for name in wanted or () if name not in found]
    if absent:
        raise NotFound(f"The model has no module {', '.join(absent)}.")
