"""One request in progress: its samples, and the outputs that are ready so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ...protocol.adapters import Drawn
from ...protocol.generation import Generate, Output, Result, Timings
from .sample import SampleRun


@dataclass(slots=True, eq=False)
class Job:
    """A request, one sample per output, and what they have produced.

    ``failed`` means that the request was answered with an error; the job exists until every rank drops its work.
    """

    request: Generate
    samples: list[SampleRun] = field(default_factory=list)
    outputs: dict[int, Output] = field(default_factory=dict)
    pending_previews: int = 0
    versions: list[str] = field(default_factory=list)
    adapters: list[Drawn] = field(default_factory=list)
    failed: bool = False
    finished_samples: int = 0
    """Counted on ranks that are not primary."""

    @property
    def drawn(self) -> bool:
        """True when no forward is left to run."""
        return all(sample.coroutine.finished for sample in self.samples)

    @property
    def done(self) -> bool:
        """True when every output is encoded and every preview is sent."""
        return len(self.outputs) == len(self.samples) and not self.pending_previews

    @property
    def log_fields(self) -> dict[str, str]:
        return {"request_id": self.request.request_id}

    def result(self) -> Result:
        outputs = [self.outputs[index] for index in range(len(self.samples))]
        steps = max(sample.steps for sample in self.samples)
        request_id, versions = self.request.request_id, self.versions
        skipped = sum(sample.savings.skipped for sample in self.samples)
        return Result(request_id, outputs, self._timings(), steps, versions[-1], versions, self.adapters, skipped)

    def _timings(self) -> Timings:
        """Encoding, denoising and decoding, divided by the samples' first denoiser call and last step."""
        now = time.perf_counter()
        clocks = [sample.clock for sample in self.samples]
        submitted = min(clock.submitted for clock in clocks)
        started = min(clock.started or now for clock in clocks)
        first = min(clock.first_denoise or now for clock in clocks)
        last = max(clock.last_step or now for clock in clocks)
        return Timings(0.0, max(0.0, first - started), max(0.0, last - first), max(0.0, now - last), now - submitted)
