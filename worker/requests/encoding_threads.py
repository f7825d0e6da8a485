"""Threads that encode outputs and previews, so that the loop that runs forwards never waits for a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from ...protocol.codec import Buffer
from ...protocol.errors import Internal, SafelightError
from ...protocol.generation import Output, Preview
from ...protocol.rollouts import RolledOut
from ..crossing.steps import DenoisingStep
from ..media.encoding import Floats, Waveform, encode, encode_image, to_uint8
from ..media.sound import Sound
from ..model.model import Model
from ..parallel.device import use_device
from ..pipelines.frame_rate import rate_argument
from ..rollout import record
from .failure import NotFinite
from .host_copies import HostCopies
from .job import Job
from .sample import SampleRun

log = logging.getLogger(__name__)

Wait = Callable[[], object]
"""Returns once a copy to the host is there."""


@dataclass(slots=True, eq=False)
class Encoded:
    """An encoding thread's result for a job: an output, a preview (``None`` if it failed), or an error."""

    job: Job
    index: int
    output: Output | None = None
    preview: Preview | None = None
    error: Exception | None = None


class EncodingThreads:
    """Encodes in half as many threads as there are cores.

    ``ended`` is called, in a thread, with each encoding; ``is_dropped`` says which jobs need none any more. Tensors of
    rollouts go to the directory ``shared`` if the request asks for shared memory.
    """

    def __init__(
        self, model: Model, ended: Callable[[Encoded], None], is_dropped: Callable[[Job], bool], shared: Path | None
    ) -> None:
        self._model = model
        self._ended = ended
        self._is_dropped = is_dropped
        self._shared = shared
        self._copies = HostCopies(model.device)
        self._threads = ThreadPoolExecutor(
            max(1, (os.cpu_count() or 2) // 2), "encode", initializer=use_device, initargs=(model.device,)
        )

    def submit_output(self, job: Job, sample: SampleRun, pixels: torch.Tensor, sound: Sound | None) -> None:
        """Encode ``pixels``, a picture [C, H, W] or a clip [F, C, H, W] in [0, 1], and its ``sound``.

        Those of an encode-only request are its embeddings' values.
        """
        if sample.rolled_out is not None:
            sample.rolled_out = record.on_the_host(sample.rolled_out, self._copies.begin)
        on_host = self._copies.begin(_widened(pixels))
        heard = None if sound is None else Sound(self._copies.begin(sound.samples), sound.rate)
        self._threads.submit(self._encode_output, job, sample, on_host, heard, self._copies.end())

    def submit_preview(self, job: Job, index: int, step: DenoisingStep, pixels: torch.Tensor) -> None:
        """Encode the picture ``pixels``, or the first one of a clip."""
        picture = self._copies.begin(_widened(pixels if pixels.ndim == 3 else pixels[0]))
        self._threads.submit(self._encode_preview, job, index, step, picture, self._copies.end())

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _encode_output(
        self, job: Job, sample: SampleRun, pixels: torch.Tensor, sound: Sound | None, wait: Wait
    ) -> None:
        if self._is_dropped(job):
            return
        encoded = Encoded(job, sample.index)
        try:
            wait()
            encoded.output = self._output(job, sample, pixels, sound)
        except (SafelightError, NotFinite, torch.AcceleratorError) as error:
            encoded.error = error
        except Exception:
            log.exception("encoding output %d failed", sample.index, extra=job.log_fields)
            encoded.error = Internal("the output could not be encoded")
        self._ended(encoded)

    def _output(self, job: Job, sample: SampleRun, on_host: torch.Tensor, sound: Sound | None) -> Output:
        request = job.request
        pixels: Floats = on_host.numpy()
        waveform = None if sound is None else Waveform(sound.samples.numpy(), sound.rate)
        if not np.isfinite(pixels).all() or (waveform is not None and not np.isfinite(waveform.samples).all()):
            raise NotFinite
        if sample.embeddings is not None:
            return _file_of(sample.embeddings, sample.seed)
        fps = self._frame_rate(sample) if pixels.ndim == 4 else None
        height, width = pixels.shape[-2:]
        return Output(
            Buffer(b"" if request.rollout is not None else encode(pixels, request.output_format, fps, waveform)),
            request.output_format,
            sample.seed,
            width,
            height,
            pixels.shape[0] if pixels.ndim == 4 else None,
            fps,
            audio_sample_rate=None if waveform is None else waveform.rate,
            rolled_out=self._rolled_out(job, sample),
        )

    def _rolled_out(self, job: Job, sample: SampleRun) -> RolledOut | None:
        rollout = job.request.rollout
        if rollout is None:
            return None
        assert sample.rolled_out is not None, "the sample has finished"
        recorded, sample.rolled_out = sample.rolled_out, None
        return record.encoded(recorded, self._shared if rollout.shared_memory else None)

    def _frame_rate(self, sample: SampleRun) -> int:
        """Frames per second of a clip: the request's, or its pipeline argument's, or the model's."""
        request = sample.request
        return request.fps or rate_argument(request.extra) or self._model.frame_rate(sample.task)

    def _encode_preview(self, job: Job, index: int, step: DenoisingStep, picture: torch.Tensor, wait: Wait) -> None:
        encoded = Encoded(job, index)
        try:
            wait()
            image = Buffer(encode_image(to_uint8(picture.numpy()), "jpeg"))
            encoded.preview = Preview(job.request.request_id, index, step.number, step.total, image)
        except torch.AcceleratorError as error:
            encoded.error = error
        except Exception:
            log.exception("encoding a preview failed", extra=job.log_fields)
        self._ended(encoded)


def _file_of(embeddings: dict[str, torch.Tensor], seed: int) -> Output:
    """A safetensors file; nothing if there are no embeddings."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in embeddings.items()}
    return Output(Buffer(save(tensors) if tensors else b""), "pt", seed, 0, 0)


def _widened(pixels: torch.Tensor) -> torch.Tensor:
    """In fp32 on its device, so that the encoding threads only copy: torch must not compute in them."""
    return pixels.detach().float()
