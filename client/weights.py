"""A server's weights, as a trainer or an operator handles them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, overload

from msgspec.structs import replace

from ..protocol.adapters import SENT
from ..protocol.errors import InvalidRequest, NotFound
from ..protocol.operations import Barrier
from . import weight_calls
from .adapter_warning import warn_of_adapters
from .calls import Call
from .checksum import ModuleChecksum
from .endpoint import Endpoint
from .named_tensors import NamedTensors, leads, read, to_the_end
from .results import WeightUpdate
from .weight_link import Dtypes, WeightLink
from .weight_routes import RouteName
from .weight_sending import BUCKET_BYTES, Load, OnProgress, digests, in_buckets

DENOISER = "transformer"


class Weights:
    """The weights of one server; :attr:`Client.weights` is one. Every method raises what those of ``Client`` do."""

    def __init__(self, endpoint: Endpoint, fetch: Callable[[Call], bytes]) -> None:
        self._link = WeightLink(endpoint, fetch)

    def update(
        self,
        named_tensors: NamedTensors,
        *,
        target_module: str = DENOISER,
        version: str | None = None,
        verify: bool = True,
        mode: Barrier = "wait",
        flush_cache: bool = True,
        on_progress: OnProgress | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        route: RouteName | None = None,
        timeout_s: float = 300.0,
    ) -> WeightUpdate | None:
        """Write tensors, under their checkpoint names, into ``target_module``; all of them or none.

        ``named_tensors`` is a module, tensors by name or in pairs, or the path of one module's safetensors files. They
        have the checkpoint's shapes, whatever the server divides or fuses; any floating dtype becomes the parameter's,
        and another must be the parameter's. A module may be compiled, or wrapped by DDP or FSDP.

        Where tensors are divided among the ranks of a torch.distributed group (DTensors, FSDP), all ranks call this:
        tensors are gathered one at a time, and rank 0 sends them, raises what goes wrong, and alone gets a result.

        Their memory is read until this returns, so it may not change, nor be that of the next pair of an iterable.
        They travel in buckets of ``bucket_bytes``, through shared memory where the server is on this machine, else over
        HTTP; ``route`` chooses. ``on_progress`` hears of bytes, and may be called from another thread. With ``verify``
        the server's tensors are compared by digest with what was sent, when they serve.

        ``mode`` says what becomes of requests that came before: they end first (``wait``), are ended (``abort``), or go
        on with the new weights (``in_place``).

        Warns ``OffPolicy`` where adapters have a part in what the server then draws, merged or dynamic.

        Raises ``TensorsRejected`` for names, shapes and dtypes that the model does not have, ``TensorsDiffer`` where
        the server does not hold what was sent, and ``ConnectionLost`` or ``DeadlinePassed`` without an answer: then
        :meth:`version` says whether the update serves.
        """
        given = read(named_tensors)
        if not leads():
            given.take_part()
            return None
        with to_the_end(given) as tensors:
            buckets = in_buckets(tensors, bucket_bytes)
            first = next(buckets, None)
            if first is None:
                raise InvalidRequest("There are no tensors to write.")
            load = Load(target_module, chain([first], buckets), given.nbytes, on_progress, route)
            if first.last:
                return self._update_at_once(load, version, verify, mode, flush_cache)
            with self.begin(version, [target_module], mode, timeout_s, verify=verify) as begun:
                begun.send(load, flush_cache)
            return begun.result

    def _update_at_once(
        self, load: Load, version: str | None, verify: bool, mode: Barrier, flush_cache: bool
    ) -> WeightUpdate:
        dtypes = self._link.dtypes([load.module])[load.module] if verify else None
        fields = {"mode": mode, "flush_cache": flush_cache, **({} if version is None else {"weight_version": version})}
        began = time.monotonic()
        reply, hashed = self._link.send(load, fields, dtypes)
        updated = replace(self._link.updated(reply), elapsed_s=time.monotonic() - began)
        if verify:
            self._link.check({load.module: hashed})
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
        route: RouteName | None = None,
        timeout_s: float = 300.0,
    ) -> WeightUpdate | None:
        """Merge a LoRA adapter's tensors into ``target_module``, in place of those that were sent so before.

        ``named_tensors`` are under the names of any format that adapters' files have, PEFT's and diffusers' too;
        ``alpha`` and ``rank`` are for tensors that do not say theirs. They travel in buckets of ``bucket_bytes``, which
        are merged all at once or not at all, and are not verified by digest. The server lists the adapter as
        ``lora_merge:transformer``, and gives the base's bytes back when it is unmerged. Raises ``InvalidRequest`` for
        what is no adapter of the module, and ``ConnectionLost`` or ``DeadlinePassed`` without an answer: then
        :meth:`version` says whether it serves.
        """
        given = read(named_tensors)
        if not leads():
            given.take_part()
            return None
        began = time.monotonic()
        with to_the_end(given) as tensors:
            buckets = in_buckets(tensors, bucket_bytes)
            first = next(buckets, None)
            if first is None:
                raise InvalidRequest("There are no tensors to merge.")
            load = Load(target_module, chain([first], buckets), given.nbytes, on_progress, route)
            if not first.last:
                with self.begin(version, [target_module], mode, timeout_s, verify=False) as begun:
                    begun.send_lora(load, alpha, rank)
                return begun.result
            alone = {"mode": mode, "lora_complete": True, **({} if version is None else {"weight_version": version})}
            reply, _ = self._link.send(load, {**_lora(alpha, rank), **alone}, None)
        updated = replace(self._link.updated(reply), elapsed_s=time.monotonic() - began)
        warn_of_adapters(updated, [_sent(target_module)], stacklevel=2)
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
        """An update of several parts, to ``modules`` (the transformer, when not given), as a context.

        A clean exit commits it, and then verifies it; an exception aborts it, and every byte is as before. With
        ``require_complete`` it is committed only if every tensor of the modules came, else ``InvalidRequest`` is
        raised. Generation that arrives in between waits, and so does everything else that is asked of the server's
        weights: within the context only the update's own methods get an answer. The server aborts an update of which it
        hears nothing for ``timeout_s`` seconds; it hears of a part when the part is there.

        Of a trainer's ranks all go through the same calls in it, and leave it together.
        """
        named = list(modules or [DENOISER])
        if not leads():
            yield BegunUpdate(self._link, {}, named, None)
            return
        dtypes = self._link.dtypes(named) if verify else None  # while nothing holds up the server
        began = time.monotonic()
        update_id = self._link.begin(version, named, mode, timeout_s)
        begun = BegunUpdate(self._link, {"update_id": update_id}, named, dtypes)
        try:
            yield begun
            committed = self._link.commit(update_id, require_complete)
        except BaseException as error:
            self._link.abort(update_id, error)
            raise
        begun.result = replace(committed, elapsed_s=time.monotonic() - began)
        if verify:
            self._link.check(begun.digests)
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

        ``target_modules`` are those of a pipeline's directory; all that it has, when not given. A directory must have
        every tensor of its modules, and a file need not, unless ``require_complete`` says otherwise. Raises
        ``InvalidRequest`` where they are not there, or do not fit.
        """
        call = weight_calls.update_from_disk(
            path, target_modules=target_modules, version=version, mode=mode, require_complete=require_complete
        )
        updated = self._link.update_from_disk(call)
        warn_of_adapters(updated, stacklevel=2)
        return updated

    def verify(self, named_tensors: NamedTensors, *, target_module: str = DENOISER) -> None:
        """Compare the server's tensors with these. Raises ``TensorsDiffer`` with the names of those that differ."""
        given = read(named_tensors)
        if not leads():
            given.take_part()
            return
        hashed: dict[str, str] = {}
        with to_the_end(given) as tensors, ThreadPoolExecutor() as pool:
            dtypes = self._link.dtypes([target_module])[target_module]
            for bucket in in_buckets(tensors, BUCKET_BYTES):
                hashed |= {name: one.result() for name, one in digests(bucket.tensors, dtypes, pool).items()}
        self._link.check({target_module: hashed})

    @overload
    def checksum(self, modules: Sequence[str] | None = None, *, detail: Literal[False] = False) -> dict[str, str]: ...

    @overload
    def checksum(self, modules: Sequence[str] | None = None, *, detail: Literal[True]) -> dict[str, ModuleChecksum]: ...

    def checksum(
        self, modules: Sequence[str] | None = None, *, detail: bool = False
    ) -> dict[str, str] | dict[str, ModuleChecksum]:
        """SHA-256 of each module, in hex; with ``detail`` of every tensor too. Raises ``NotFound``."""
        if detail:
            detailed = self._link.checksums(modules)
            _refuse_absent(modules, detailed)
            return detailed
        told = self._link.document(weight_calls.checksum(modules, detail=False))
        _refuse_absent(modules, {name for name, digest in told.items() if digest != "not_found"})
        return told

    def version(self) -> str:
        """The version of the weights that serve now."""
        version: str = self._link.document(weight_calls.WEIGHT_VERSION)["weight_version"]
        return version


class BegunUpdate:
    """What :meth:`Weights.begin` gives: parts are written, and serve when its context is left."""

    def __init__(
        self,
        link: WeightLink,
        fields: Mapping[str, Any],
        modules: Sequence[str],
        dtypes: Mapping[str, Dtypes] | None,
    ) -> None:
        self.result: WeightUpdate | None = None
        """What serves, once the context was left; ``None`` on ranks that do not send."""
        self.digests: dict[str, dict[str, str]] = {}
        """Of every tensor that was sent, by module."""
        self.adapters: set[str] = set()
        """The nicknames of those that were sent."""
        self._link = link
        self._fields = fields
        self._modules = modules
        self._dtypes = dtypes

    def update(
        self,
        named_tensors: NamedTensors,
        *,
        target_module: str = DENOISER,
        flush_cache: bool = True,
        on_progress: OnProgress | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        route: RouteName | None = None,
    ) -> None:
        """Write a part, with the arguments and errors of :meth:`Weights.update`; later parts may write over it."""
        given = read(named_tensors)
        if not leads():
            given.take_part()
            return
        with to_the_end(given) as tensors:
            buckets = in_buckets(tensors, bucket_bytes)
            self.send(Load(target_module, buckets, given.nbytes, on_progress, route), flush_cache)

    def update_lora(
        self,
        named_tensors: NamedTensors,
        *,
        target_module: str = DENOISER,
        alpha: float | None = None,
        rank: int | None = None,
        on_progress: OnProgress | None = None,
        bucket_bytes: int = BUCKET_BYTES,
        route: RouteName | None = None,
    ) -> None:
        """Add layers to an adapter, with the arguments of :meth:`Weights.update_lora`; it is merged with the commit."""
        given = read(named_tensors)
        if not leads():
            given.take_part()
            return
        with to_the_end(given) as tensors:
            buckets = in_buckets(tensors, bucket_bytes)
            self.send_lora(Load(target_module, buckets, given.nbytes, on_progress, route), alpha, rank)

    def send_lora(self, load: Load, alpha: float | None, rank: int | None) -> None:
        """Add layers that are in buckets already."""
        self._check_module(load.module)
        self.adapters.add(_sent(load.module))
        self._link.send(load, {**self._fields, **_lora(alpha, rank)}, None)

    def _check_module(self, module: str) -> None:
        if module not in self._modules:
            raise InvalidRequest(
                f"This update was begun for {', '.join(self._modules)}: name {module} in begin(modules=[…])."
            )

    def send(self, load: Load, flush_cache: bool) -> None:
        """Write a part that is in buckets already."""
        self._check_module(load.module)
        dtypes = None if self._dtypes is None else self._dtypes[load.module]
        fields = {**self._fields, "flush_cache": flush_cache}
        _, hashed = self._link.send(load, fields, dtypes)
        if hashed:
            self.digests.setdefault(load.module, {}).update(hashed)


def _sent(module: str) -> str:
    """The nickname of an adapter that comes as tensors."""
    return f"{SENT}:{module}"


def _lora(alpha: float | None, rank: int | None) -> dict[str, Any]:
    fields = {"weight_update_mode": "lora_merge", "lora_alpha": alpha, "lora_rank": rank}
    return {name: value for name, value in fields.items() if value is not None}


def _refuse_absent(wanted: Sequence[str] | None, found: Collection[str]) -> None:
    absent = [name for name in wanted or () if name not in found]
    if absent:
        raise NotFound(f"The model has no module {', '.join(absent)}.")
