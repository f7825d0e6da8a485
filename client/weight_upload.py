"""Send one module's tensors in buckets, and digest them on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ..protocol.errors import InvalidRequest
from .calls import Ask
from .host_tensors import HostTensor
from .named_tensors import NamedTensors, drained, is_primary, read
from .results import UpdateProgress, WeightUpdate
from .transports import EncodedBucket, Transport, TransportName

BUCKET_BYTES = 128 << 20

OnProgress = Callable[[UpdateProgress], object]


@dataclass(frozen=True, slots=True)
class Bucket:
    tensors: Sequence[HostTensor]
    last: bool


def in_buckets(tensors: Iterable[HostTensor], limit: int) -> Iterator[Bucket]:
    """Group ``tensors``, in order, into buckets of up to ``limit`` bytes; a larger tensor has a bucket of its own."""
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


def digest_tensors(
    tensors: Sequence[HostTensor], dtypes: Mapping[str, str], pool: ThreadPoolExecutor
) -> Mapping[str, Future[str]]:
    """Digest ``tensors`` by name on all cores, each cast to its dtype in ``dtypes``."""

    def digest(tensor: HostTensor) -> str:
        return tensor.cast(dtypes.get(tensor.name, tensor.dtype)).digest()

    return {tensor.name: pool.submit(digest, tensor) for tensor in tensors}


@dataclass(frozen=True, slots=True)
class UploadJob:
    """Tensors for ``module``, ``total`` bytes where that is known.

    ``on_progress`` may be called from another thread; ``route`` ``None`` chooses the fastest transport.
    """

    module: str
    buckets: Iterator[Bucket]
    total: int | None
    on_progress: OnProgress | None
    route: TransportName | None

    def peeked(self, purpose: str) -> tuple[UploadJob, bool]:
        """Return the whole job, and whether one bucket holds it. Raises ``InvalidRequest`` if it has no tensors."""
        first = next(self.buckets, None)
        if first is None:
            raise InvalidRequest(f"There are no tensors to {purpose}.")
        return replace(self, buckets=chain([first], self.buckets)), first.last


@contextmanager
def upload_job(
    named_tensors: NamedTensors,
    module: str,
    on_progress: OnProgress | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    route: TransportName | None = None,
) -> Iterator[UploadJob | None]:
    """Read tensors into buckets on the rank that sends; other ranks take part in gathering and get ``None``."""
    stream = read(named_tensors)
    if not is_primary():
        stream.take_part()
        yield None
        return
    with drained(stream) as tensors:
        yield UploadJob(module, in_buckets(tensors, bucket_bytes), stream.nbytes, on_progress, route)


class Upload:
    """Sends ``job`` over ``transport``, with ``fields`` in every call.

    ``dtypes`` are the server's, by tensor name; ``None`` computes no digests.
    """

    def __init__(
        self,
        ask: Ask,
        transport: Transport,
        job: UploadJob,
        fields: Mapping[str, Any],
        dtypes: Mapping[str, str] | None,
    ) -> None:
        self.digests: dict[str, str] = {}
        """Digests that the server should have, by tensor name."""
        self._ask = ask
        self._transport = transport
        self._job = job
        self._fields = {"target_module": job.module, **fields}
        self._dtypes = dtypes
        self._encoded_bytes = 0

    def send(self) -> WeightUpdate:
        """Send the buckets in order, encoding each while the one before it is sent. Returns the last reply."""
        with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor() as hashing:
            before: Future[WeightUpdate] | None = None
            updated: WeightUpdate | None = None
            for bucket in self._job.buckets:
                encoded = self._encode(bucket.tensors)
                hashed = {} if self._dtypes is None else digest_tensors(bucket.tensors, self._dtypes, hashing)
                if before is not None:
                    before.result()
                if bucket.last:
                    updated = self._post(encoded)  # in this thread, where Ctrl-C interrupts it
                else:
                    before = thread.submit(self._post, encoded)
                self.digests |= {name: digest.result() for name, digest in hashed.items()}
        assert updated is not None, "a job has tensors"
        return updated

    def _encode(self, tensors: Sequence[HostTensor]) -> EncodedBucket:
        before = self._encoded_bytes
        self._encoded_bytes += sum(tensor.nbytes for tensor in tensors)

        def on_sent(sent: int) -> None:
            if self._job.on_progress is not None:
                self._job.on_progress(UpdateProgress(before + sent, self._job.total))

        return self._transport.encode(tensors, self._fields, on_sent)

    def _post(self, encoded: EncodedBucket) -> WeightUpdate:
        try:
            return self._ask(encoded.call)
        finally:
            encoded.release()
