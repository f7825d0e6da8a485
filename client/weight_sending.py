"""One module's tensors on their way: in buckets, each made while the one before it is sent, with their digests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .calls import Call
from .host_tensors import HostTensor
from .results import UpdateProgress
from .weight_routes import Parcel, Route, RouteName

BUCKET_BYTES = 128 << 20

OnProgress = Callable[[UpdateProgress], object]


@dataclass(frozen=True, slots=True)
class Bucket:
    tensors: Sequence[HostTensor]
    last: bool


def in_buckets(tensors: Iterable[HostTensor], limit: int) -> Iterator[Bucket]:
    """``tensors`` in their order, in buckets of up to ``limit`` bytes; a larger tensor has one of its own."""
    held: list[HostTensor] = []
    size = 0
    for tensor in tensors:
        if held and size + tensor.nbytes > limit:
            yield Bucket(held, last=False)
            held, size = [], 0
        held.append(tensor)
        size += tensor.nbytes
    if held:
        yield Bucket(held, last=True)


def digests(
    tensors: Sequence[HostTensor], dtypes: Mapping[str, str], pool: ThreadPoolExecutor
) -> Mapping[str, Future[str]]:
    """Of ``tensors`` as a module of ``dtypes`` holds them, computed on all cores."""

    def digest(tensor: HostTensor) -> str:
        return tensor.cast(dtypes.get(tensor.name, tensor.dtype)).digest()

    return {tensor.name: pool.submit(digest, tensor) for tensor in tensors}


@dataclass(frozen=True, slots=True)
class Load:
    """Tensors of ``module`` to be written: ``total`` bytes of them, where that is known.

    ``on_progress`` may be called from a thread of ours; ``route`` is ``None`` where the best is wanted.
    """

    module: str
    buckets: Iterable[Bucket]
    total: int | None
    on_progress: OnProgress | None
    route: RouteName | None


class Sending:
    """Sends ``load`` by ``route``, with ``fields`` in every call.

    ``dtypes`` are the server's, by tensor; ``None`` where no digests are wanted.
    """

    def __init__(
        self,
        fetch: Callable[[Call], bytes],
        route: Route,
        load: Load,
        fields: Mapping[str, Any],
        dtypes: Mapping[str, str] | None,
    ) -> None:
        self.digests: dict[str, str] = {}
        """Of the tensors that were sent, as the server should hold them."""
        self._fetch = fetch
        self._route = route
        self._load = load
        self._fields = {"target_module": load.module, **fields}
        self._dtypes = dtypes
        self._packed = 0

    def send(self) -> bytes:
        """Send all buckets, one after the other. Returns the last reply."""
        with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor() as hashing:
            before: Future[bytes] | None = None
            reply = b""
            for bucket in self._load.buckets:
                parcel = self._pack(bucket.tensors)
                hashed = {} if self._dtypes is None else digests(bucket.tensors, self._dtypes, hashing)
                if before is not None:
                    before.result()
                if bucket.last:
                    reply = self._post(parcel)  # here, where Ctrl-C ends it
                else:
                    before = thread.submit(self._post, parcel)
                self.digests |= {name: digest.result() for name, digest in hashed.items()}
        return reply

    def _pack(self, tensors: Sequence[HostTensor]) -> Parcel:
        packed = self._packed
        self._packed += sum(tensor.nbytes for tensor in tensors)

        def tell(sent: int) -> None:
            if self._load.on_progress is not None:
                self._load.on_progress(UpdateProgress(packed + sent, self._load.total))

        return self._route.pack(tensors, self._fields, tell)

    def _post(self, parcel: Parcel) -> bytes:
        try:
            return self._fetch(parcel.call)
        finally:
            parcel.release()
