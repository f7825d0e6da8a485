"""The interceptors of one sample that save forwards."""

from __future__ import annotations

from dataclasses import dataclass

from ..crossing.chain import Interceptor
from ..crossing.steps import DenoisingStep
from .guidance_pairing import GuidancePairing
from .step_cache import StepCache


@dataclass(frozen=True, slots=True)
class Savings:
    """The interceptors that the sample's request and the server's options allow; by default none."""

    cache: StepCache | None = None
    pairing: GuidancePairing | None = None

    @property
    def interceptors(self) -> list[Interceptor]:
        """In the order of a chain; pairing must be its last one."""
        return [one for one in (self.cache, self.pairing) if one is not None]

    @property
    def skipped(self) -> int:
        """Calls answered by the step cache."""
        return 0 if self.cache is None else self.cache.skipped

    def stepped(self, step: DenoisingStep) -> None:
        if self.cache is not None:
            self.cache.stepped(step.number, step.total)

    def forget(self) -> None:
        """Drop all answers, after the weights have changed."""
        if self.cache is not None:
            self.cache.forget()

    def settle(self) -> None:
        """Raise ``PredictionWrong`` if the sample must not be used."""
        if self.pairing is not None:
            self.pairing.settle()


NOTHING_SAVED = Savings()
