"""Requests in progress: each becomes a coroutine per output, and all their outputs become one result."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from ..protocol.adapters import AdapterState, Drawn, Use, drawn
from ..protocol.codec import Buffer
from ..protocol.errors import ClientGone, Internal, SafelightError
from ..protocol.generation import Failed, Generate, Output, Preview, Progress, Result, Timings
from ..protocol.messages import FromWorker
from ..protocol.replicas import ReplicaStats
from .batcher import Batcher
from .encoding import Floats, Waveform, encode, encode_image, to_uint8
from .failure import NotFinite, explain
from .frame_rate import rate_told
from .lora.adapters import RankAdapters
from .model import Model, use_device
from .preview import preview
from .rollout import record
from .sample import SampleRun
from .sound import Sound
from .steps import Step

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Job:
    """A request, its samples, and the outputs that are ready so far. It is done when no preview is owed either.

    One that has ``failed`` was answered, and is there until its work is dropped.
    """

    request: Generate
    samples: list[SampleRun] = field(default_factory=list)
    outputs: dict[int, Output] = field(default_factory=dict)
    previews_owed: int = 0
    versions: list[str] = field(default_factory=list)
    adapters: list[Drawn] = field(default_factory=list)
    failed: bool = False
    finished: int = 0

    @property
    def drawn(self) -> bool:
        """Whether no forward is left to make for it."""
        return all(sample.coroutine.finished for sample in self.samples)

    @property
    def done(self) -> bool:
        return len(self.outputs) == len(self.samples) and not self.previews_owed


@dataclass(slots=True, eq=False)
class _Encoded:
    """An encoding thread's answer: an output or its error, or else a preview, ``None`` where it failed."""

    job: Job
    index: int
    output: Output | None = None
    preview: Preview | None = None
    error: Exception | None = None


class Jobs:
    """Starts, cancels and finishes requests. ``send`` takes the messages for the scheduler.

    Encoding runs in threads; :meth:`collect` takes in what they have finished, after they have called ``wake``. A rank
    that does not lead (``leads``) runs the same samples, and neither encodes nor sends.
    """

    def __init__(
        self,
        model: Model,
        batcher: Batcher,
        send: Callable[[FromWorker], None],
        wake: Callable[[], None] = lambda: None,
        *,
        leads: bool = True,
        adapters: RankAdapters | None = None,
        shared: Path | None = None,
    ) -> None:
        self._model = model
        self._batcher = batcher
        self._send = send
        self._adapters = adapters
        self._shared = shared
        self._wake = wake
        self._leads = leads
        self._jobs: dict[str, Job] = {}
        self._threads = ThreadPoolExecutor(
            max(1, (os.cpu_count() or 2) // 2), "encode", initializer=use_device, initargs=(model.device,)
        )
        self._encoded: SimpleQueue[_Encoded] = SimpleQueue()
        self._failing: list[str] = []
        self._outputs = self._cancelled = self._failed = 0
        self._weights_are_sound = False  # whether the weights that serve now are known to make finite values

    def stats(self) -> ReplicaStats:
        counters = self._batcher.runner.counters
        return ReplicaStats(
            running=sum(len(job.samples) - len(job.outputs) for job in self._jobs.values()),
            forwards=counters.forwards,
            calls=counters.calls,
            outputs=self._outputs,
            cancelled=self._cancelled,
            failed=self._failed,
            unmergeable=self._batcher.policy.unmergeable,
            caps=self._batcher.policy.caps,
            stages=[stage.name for stage in self._batcher.runner.stages],
            costs=self._model.costs.measured(),
        )

    def submit(self, request: Generate) -> None:
        """Start every sample of ``request``; one with an adapter that is not there fails."""
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
                self._model, request, index, self._stepped, lambda done: self._finished(job, done), wanted
            )
            job.samples.append(sample)
            self._batcher.start(sample.coroutine)

    def set_version(self, weight_version: str) -> None:
        """The weights or the adapters may be others from now on, also for what is in progress."""
        self._weights_are_sound = False
        for job in self._jobs.values():
            if job.drawn:
                continue
            if job.versions[-1] != weight_version:
                job.versions.append(weight_version)
            # what a request names itself was decided when it came
            now = self._drawn(None if job.request.lora is None else [])
            job.adapters += [one for one in now if one not in job.adapters]

    def _drawn(self, uses: list[Use] | None) -> list[Drawn]:
        return drawn(AdapterState() if self._adapters is None else self._adapters.state, uses)

    def cancel(self, request_id: str) -> None:
        """Stop the request's work where it stands. An unknown or finished request is ignored."""
        job = self._jobs.get(request_id)
        if job is not None and not job.failed:
            self._cancelled += 1
            self._end(job, Failed(request_id, ClientGone("the request was cancelled").info()))

    def collect(self) -> list[str]:
        """Take in finished encodings, and send the results and previews that they complete.

        Returns the requests that have failed since the last time. What fails may have failed on this rank alone, so
        that their work goes on until every rank is to :meth:`drop` them, in the same turn.
        """
        while not self._encoded.empty():
            encoded = self._encoded.get()
            job = encoded.job
            if self._gone(job):
                record.forget(encoded.output)
                continue
            if encoded.error is not None:
                self._fail(job, self._explained(encoded.error, job))
                continue
            if encoded.output is not None:
                job.outputs[encoded.index] = encoded.output
                self._outputs += 1
                self._weights_are_sound = True
            else:
                job.previews_owed -= 1
                if encoded.preview is not None:
                    self._send(encoded.preview)
            if job.done:
                self._end(job, self._result(job))
        failing, self._failing = self._failing, []
        return failing

    def drop(self, request_id: str) -> None:
        """Stop the work of a request whose failure was sent."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self._stop(job)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _end(self, job: Job, message: Result | Failed) -> None:
        del self._jobs[job.request.request_id]
        if isinstance(message, Failed):
            self._stop(job)
        self._send(message)

    def _stop(self, job: Job) -> None:
        """Nobody waits for it any more: neither for what is in progress nor for what is done."""
        for sample in job.samples:
            self._batcher.cancel(sample.coroutine)
        for output in job.outputs.values():
            record.forget(output)

    def _fail(self, job: Job, error: SafelightError) -> None:
        """Answer the request; its work ends by :meth:`drop`."""
        self._failed += 1
        job.failed = True
        self._failing.append(job.request.request_id)
        self._send(Failed(job.request.request_id, error.info()))
        self._wake()

    def _stepped(self, sample: SampleRun, step: Step) -> None:
        request = sample.request
        if request.progress:
            self._send(Progress(request.request_id, sample.index, step.number, step.total))
        if request.preview_every and step.number % request.preview_every == 0 and step.number < step.total:
            self._preview(sample, step)

    def _preview(self, sample: SampleRun, step: Step) -> None:
        job = self._jobs[sample.request.request_id]
        try:
            with sample.aside():
                pixels = preview(
                    sample.task,
                    sample.arguments(),
                    step.clean_estimate(),
                    watches_all=sample.watches_all,
                )
            picture = _widened(pixels if pixels.ndim == 3 else pixels[0])
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("a preview failed", extra=_in(job))
            return
        if not self._leads:
            return
        job.previews_owed += 1
        self._threads.submit(self._encode_preview, job, sample.index, step, picture)

    def _finished(self, job: Job, sample: SampleRun) -> None:
        if self._gone(job):
            return
        error, pixels, sound = sample.coroutine.error, sample.coroutine.result, sample.sound
        # they are large, and the job may live on for long
        sample.coroutine.error = sample.coroutine.result = sample.sound = None
        if not self._leads:
            self._followed(job, sample, error)
            return
        try:
            if error is not None:
                raise error
            if sample.rolled_out is not None:
                sample.rolled_out = record.on_the_host(sample.rolled_out)
            self._threads.submit(self._encode_output, job, sample, _widened(pixels), sound)
        except BaseException as failure:  # the pipeline's, or memory for the copy: this request's failure
            told = self._explained(failure, job)
            if told.status >= 500:
                log.error("output %d failed", sample.index, exc_info=failure, extra=_in(job))
            else:  # the client's mistake, which may come often
                log.info("output %d failed: %s", sample.index, told.message, extra=_in(job))
            self._fail(job, told)

    def _followed(self, job: Job, sample: SampleRun, error: BaseException | None) -> None:
        """A rank that does not lead has made a sample, or failed to: what that means is the leader's to say."""
        if isinstance(error, torch.AcceleratorError):
            raise error
        if error is not None:
            log.info("output %d failed on this rank: %s", sample.index, type(error).__name__, extra=_in(job))
        job.finished += 1
        if job.finished == len(job.samples):
            del self._jobs[job.request.request_id]

    def _explained(self, error: BaseException, job: Job) -> SafelightError:
        """Raises the error itself where the device is broken: nothing can be computed here any more, for anybody."""
        if isinstance(error, torch.AcceleratorError):
            log.error("the device is broken", exc_info=error, extra=_in(job))
            raise error
        if isinstance(error, NotFinite) and not self._weights_are_sound:
            self._weights_are_sound = self._model.is_finite()
        return explain(error, job.request, weights_are_sound=self._weights_are_sound)

    def _gone(self, job: Job) -> bool:
        return job.failed or self._jobs.get(job.request.request_id) is not job

    def _encode_output(self, job: Job, sample: SampleRun, widened: torch.Tensor, sound: Sound | None) -> None:
        if self._gone(job):
            return
        request = job.request
        encoded = _Encoded(job, sample.index)
        fps = self._frame_rate(sample) if widened.ndim == 4 else None
        try:
            pixels: Floats = widened.cpu().numpy()
            heard = None if sound is None else Waveform(sound.samples.cpu().numpy(), sound.rate)
            if not np.isfinite(pixels).all() or (heard is not None and not np.isfinite(heard.samples).all()):
                raise NotFinite
            rolled_out = None
            if request.rollout is None:
                data = Buffer(encode(pixels, request.output_format, fps, heard))
            else:
                assert sample.rolled_out is not None, "it has ended well"
                data, shared = Buffer(b""), self._shared if request.rollout.shared_memory else None
                rolled_out, sample.rolled_out = record.encoded(sample.rolled_out, shared), None
            height, width = pixels.shape[-2:]
            frames = pixels.shape[0] if pixels.ndim == 4 else None
            encoded.output = Output(
                data,
                request.output_format,
                sample.seed,
                width,
                height,
                frames,
                fps,
                audio_sample_rate=None if heard is None else heard.rate,
                rolled_out=rolled_out,
            )
        except (SafelightError, NotFinite, torch.AcceleratorError) as error:
            encoded.error = error
        except Exception:
            log.exception("encoding output %d failed", sample.index, extra=_in(job))
            encoded.error = Internal("the output could not be encoded")
        self._encoded.put(encoded)
        self._wake()

    def _frame_rate(self, sample: SampleRun) -> int:
        """Frames a second of a clip: what the request says, or else what its pipeline was told."""
        request = sample.request
        return request.fps or rate_told(request.extra) or self._model.frame_rate(sample.task)

    def _encode_preview(self, job: Job, index: int, step: Step, widened: torch.Tensor) -> None:
        encoded = _Encoded(job, index)
        try:
            image = Buffer(encode_image(to_uint8(widened.cpu().numpy()), "jpeg"))
            encoded.preview = Preview(job.request.request_id, index, step.number, step.total, image)
        except torch.AcceleratorError as error:
            encoded.error = error
        except Exception:
            log.exception("encoding a preview failed", extra=_in(job))
        self._encoded.put(encoded)
        self._wake()

    def _result(self, job: Job) -> Result:
        outputs = [job.outputs[index] for index in range(len(job.samples))]
        steps = max(sample.steps for sample in job.samples)
        request_id, versions = job.request.request_id, job.versions
        return Result(request_id, outputs, _timings(job), steps, versions[-1], versions, job.adapters)


def _widened(pixels: torch.Tensor) -> torch.Tensor:
    """In fp32, still on its device: so the encoding threads have nothing left to compute with torch, only to copy."""
    return pixels.detach().float()


def _in(job: Job) -> dict[str, str]:
    return {"request_id": job.request.request_id}


def _timings(job: Job) -> Timings:
    """From the first sample's start to the first denoiser call of any, to the last step of any, to now."""
    now = time.perf_counter()
    clocks = [sample.clock for sample in job.samples]
    submitted = min(clock.submitted for clock in clocks)
    started = min(clock.started or now for clock in clocks)
    first = min(clock.first_denoise or now for clock in clocks)
    last = max(clock.last_step or now for clock in clocks)
    return Timings(0.0, max(0.0, first - started), max(0.0, last - first), max(0.0, now - last), now - submitted)
