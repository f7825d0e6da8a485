"""Requests in progress: each becomes one coroutine per output, and its outputs become one result."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch

from ...protocol.adapters import AdapterState, Drawn, Use, drawn
from ...protocol.errors import ClientGone, Internal, SafelightError
from ...protocol.generation import Failed, Generate, Progress, Result
from ...protocol.messages import FromWorker
from ...protocol.replicas import GraphStats, ReplicaStats
from ..caching.caching import Caching
from ..crossing.steps import DenoisingStep
from ..forward.batcher import Batcher
from ..lora.rank_adapters import RankAdapters
from ..media.sound import Sound
from ..model.model import Model
from ..rollout import record
from .encoding_threads import Encoded, EncodingThreads
from .failure import NotFinite, drop_frames, explain
from .job import Job
from .preview import preview
from .sample import SampleRun

log = logging.getLogger(__name__)


class Jobs:
    """Starts, cancels and finishes requests. ``send`` takes the messages for the scheduler, from any thread.

    The threads that encode also send: a finished output does not wait for the end of the forward that runs. An error
    does, because its explanation may need the model: :meth:`collect` takes it in, and ``wake`` asks for that. A rank
    other than the primary runs the same samples but neither encodes nor sends.
    """

    def __init__(
        self,
        model: Model,
        batcher: Batcher,
        send: Callable[[FromWorker], None],
        wake: Callable[[], None] = lambda: None,
        *,
        is_primary: bool = True,
        adapters: RankAdapters | None = None,
        shared: Path | None = None,
        caching: Caching | None = None,
        graphs: Callable[[], GraphStats] = GraphStats,
    ) -> None:
        self._model = model
        self._graphs = graphs
        self._batcher = batcher
        self._send = send
        self._adapters = adapters
        self._caching = caching
        self._wake = wake
        self._is_primary = is_primary
        self._lock = threading.Lock()
        """Held to end a job, and to read what the encoding threads change of one."""
        self._jobs: dict[str, Job] = {}
        self._not_encoded: SimpleQueue[Encoded] = SimpleQueue()
        self._threads = EncodingThreads(model, self._take_in, self._is_dropped, shared)
        self._failing: list[str] = []
        self.drawn, self.took_s = 0, 0.0
        """Requests whose outputs are drawn, and the seconds that the last of them took."""
        self._outputs = self._cancelled = self._failed = 0
        self._weights_are_sound = False  # the current weights are known to make finite values

    def stats(self) -> ReplicaStats:
        counters, resources = self._batcher.runner.counters, self._batcher.resources
        with self._lock:
            running = sum(len(job.samples) - len(job.outputs) for job in self._jobs.values())
        return ReplicaStats(
            running=running,
            forwards=counters.forwards,
            calls=counters.calls,
            outputs=self._outputs,
            cancelled=self._cancelled,
            failed=self._failed,
            unmergeable=self._batcher.policy.unmergeable,
            caps=self._batcher.policy.caps,
            stages=self._batcher.runner.names,
            divided_forwards=counters.divided,
            costs=self._model.timing.costs(),
            merge_limits=self._model.timing.merge_limits(),
            tiled_calls=0 if resources.tiling is None else resources.tiling.tiled_calls,
            compiled={} if resources.compiled is None else dict(resources.compiled.stats()),
            **({} if self._caching is None else self._caching.counts()),
            graphs=self._graphs(),
        )

    def submit(self, request: Generate) -> None:
        """Start every sample of ``request``, or answer it at once if it names an unknown adapter."""
        try:
            wanted = None if self._adapters is None else self._adapters.wanted(request.lora)
        except SafelightError as error:
            self._failed += 1
            self._send(Failed(request.request_id, error.info()))
            return
        job = Job(request, versions=[self._model.weight_version], adapters=self._drawn(request.lora))
        self._jobs[request.request_id] = job
        for index in range(len(request.samples)):
            sample = SampleRun(
                self._model, request, index, self._on_step, partial(self._on_end, job), wanted, caching=self._caching
            )
            job.samples.append(sample)
            self._batcher.start(sample.coroutine)

    def set_version(self, weight_version: str) -> None:
        """Note a change of weights or adapters, which requests in progress use from their next call on."""
        with self._lock:
            self._weights_are_sound = False
            jobs = [*self._jobs.values()]
        for job in jobs:
            if job.drawn:
                continue
            for sample in job.samples:
                sample.savings.forget()
            if job.versions[-1] != weight_version:
                job.versions.append(weight_version)
            # adapters that the request itself names were fixed when it arrived
            active = self._drawn(None if job.request.lora is None else [])
            job.adapters += [adapter for adapter in active if adapter not in job.adapters]

    def _drawn(self, uses: list[Use] | None) -> list[Drawn]:
        return drawn(AdapterState() if self._adapters is None else self._adapters.state, uses)

    def cancel(self, request_id: str) -> None:
        """Stop the request at its next call; ignore an unknown or finished one."""
        with self._lock:
            if (job := self._jobs.get(request_id)) is None or job.failed:
                return
            self._cancelled += 1
            self._end(job, Failed(request_id, ClientGone("the request was cancelled").info()))
        self._stop(job)

    def collect(self) -> list[str]:
        """Take in the errors of encodings, and return the requests that failed since the last call.

        They may have failed on this rank alone: their work goes on until all ranks call :meth:`drop` in the same step.
        """
        while not self._not_encoded.empty():
            encoded = self._not_encoded.get()
            assert encoded.error is not None
            if not self._is_dropped(encoded.job):
                self._fail(encoded.job, self._explained(encoded.error, encoded.job))
        failing, self._failing = self._failing, []
        return failing

    def _take_in(self, encoded: Encoded) -> None:
        """In an encoding thread: send a preview, or the result when all outputs are there."""
        if encoded.error is not None:
            self._not_encoded.put(encoded)
        else:
            try:
                self._take(encoded)
            except Exception:  # nobody reads the thread's future: the request would never end
                log.exception("output %d could not be sent", encoded.index, extra=encoded.job.log_fields)
                encoded.error = Internal("the output could not be sent")
                self._not_encoded.put(encoded)
        self._wake()

    def _take(self, encoded: Encoded) -> None:
        job = encoded.job
        with self._lock:
            if self._is_dropped(job):
                record.forget(encoded.output)
                return
            if encoded.output is not None:
                job.outputs[encoded.index] = encoded.output
                self._outputs += 1
                is_current = job.versions[-1] == self._model.weight_version
                self._weights_are_sound |= is_current and job.request.encode is None
            else:
                job.pending_previews -= 1
                if encoded.preview is not None:
                    self._send(encoded.preview)
            if job.done:
                self._end(job, job.result())

    def drop(self, request_id: str) -> None:
        """Stop the work of a request that was answered with an error."""
        with self._lock:
            job = self._jobs.pop(request_id, None)
        if job is not None:
            self._stop(job)

    def close(self) -> None:
        self._threads.close()

    def _end(self, job: Job, message: Result | Failed) -> None:
        self._send(message)
        del self._jobs[job.request.request_id]

    def _stop(self, job: Job) -> None:
        """Cancel the samples, and delete the finished outputs from shared memory."""
        for sample in job.samples:
            self._batcher.cancel(sample.coroutine)
        for output in job.outputs.values():
            record.forget(output)

    def _fail(self, job: Job, error: SafelightError) -> None:
        """Answer the request with ``error``; :meth:`drop` ends its work."""
        self._failed += 1
        with self._lock:
            job.failed = True
        self._failing.append(job.request.request_id)
        self._send(Failed(job.request.request_id, error.info()))
        self._wake()

    def _on_step(self, sample: SampleRun, step: DenoisingStep) -> None:
        request = sample.request
        if request.progress:
            self._send(Progress(request.request_id, sample.index, step.number, step.total))
        if request.preview_every and step.number % request.preview_every == 0 and step.number < step.total:
            self._preview(sample, step)

    def _preview(self, sample: SampleRun, step: DenoisingStep) -> None:
        job = self._jobs[sample.request.request_id]
        try:
            with sample.aside():
                pixels = preview(
                    sample.task,
                    sample.arguments(),
                    step.clean_estimate(),
                    watches_all=sample.watches_all,
                )
            if self._is_primary:
                self._threads.submit_preview(job, sample.index, step, pixels)
                with self._lock:
                    job.pending_previews += 1
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("a preview failed", extra=job.log_fields)

    def _on_end(self, job: Job, sample: SampleRun) -> None:
        error, pixels, sound = sample.coroutine.error, sample.coroutine.result, sample.sound
        # these are large, and the job may outlive the sample by far
        sample.coroutine.error = sample.coroutine.result = sample.sound = None
        try:
            if not self._is_dropped(job):
                self._take_over(job, sample, error, pixels, sound)
        finally:
            if error is not None:
                drop_frames(error)

    def _take_over(
        self,
        job: Job,
        sample: SampleRun,
        error: BaseException | None,
        pixels: torch.Tensor,
        sound: Sound | None,
    ) -> None:
        if not self._is_primary:
            self._on_end_elsewhere(job, sample, error)
            return
        try:
            if error is not None:
                raise error
            self._threads.submit_output(job, sample, pixels, sound)
            if job.drawn:
                self.drawn, self.took_s = self.drawn + 1, time.perf_counter() - sample.clock.submitted
        except BaseException as failure:  # raised by the pipeline, or by a copy without memory: this request's failure
            explained = self._explained(failure, job)
            if explained.status >= 500:
                log.error("output %d failed", sample.index, exc_info=failure, extra=job.log_fields)
            else:  # the client's mistake, which may be frequent
                log.info("output %d failed: %s", sample.index, explained.message, extra=job.log_fields)
            self._fail(job, explained)

    def _on_end_elsewhere(self, job: Job, sample: SampleRun, error: BaseException | None) -> None:
        """End a sample on a rank other than the primary, which alone decides what a failure means."""
        if isinstance(error, torch.AcceleratorError):
            raise error
        if error is not None:
            log.info("output %d failed on this rank: %s", sample.index, type(error).__name__, extra=job.log_fields)
        job.finished_samples += 1
        if job.finished_samples == len(job.samples):
            del self._jobs[job.request.request_id]  # no thread encodes on this rank

    def _explained(self, error: BaseException, job: Job) -> SafelightError:
        """The error for the client. Raises a device error again, after which this process can compute nothing."""
        if isinstance(error, torch.AcceleratorError):
            log.error("the device no longer works", exc_info=error, extra=job.log_fields)
            raise error
        if isinstance(error, NotFinite) and not self._weights_are_sound:
            self._weights_are_sound = self._model.is_finite()
        return explain(error, job.request, weights_are_sound=self._weights_are_sound)

    def _is_dropped(self, job: Job) -> bool:
        return job.failed or self._jobs.get(job.request.request_id) is not job
