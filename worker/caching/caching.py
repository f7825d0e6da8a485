"""Saving forwards of a rank's requests: the options in force, and counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...protocol.forward_options import ForwardOptions
from ...protocol.generation import Generate
from ...protocol.step_caching import threshold
from .guidance_pairing import GuidancePairing, PairingCounts
from .savings import NOTHING_SAVED, Savings
from .step_cache import CacheCounts, StepCache


class Caching:
    """Makes the interceptors of samples.

    ``unmergeable`` names the calls that cannot share forwards. ``agreed`` returns one rank's number on all ranks.
    """

    def __init__(
        self,
        options: ForwardOptions,
        unmergeable: Mapping[str, str],
        agreed: Callable[[float], float] = lambda number: number,
    ) -> None:
        self._options = options
        self._unmergeable = unmergeable
        self._agreed = agreed
        self._paired = PairingCounts()
        self._cached = CacheCounts()

    def savings(self, request: Generate, *, merges: bool) -> Savings:
        """The interceptors of a sample of ``request``. ``merges``: its calls may share forwards.

        A trainer repeats a rollout's forwards, and a deterministic request is what plain diffusers computes.
        """
        if request.deterministic or request.rollout is not None:
            return NOTHING_SAVED
        rule, asked = self._options.step_cache_rule, request.cache
        limit = threshold(self._options.step_cache if asked is None else asked, rule)
        pairs = merges and self._options.guidance_pairing == "on"
        return Savings(
            StepCache(limit, rule, self._cached, self._agreed) if limit > 0 else None,
            GuidancePairing(self._paired, self._unmergeable) if pairs else None,
        )

    def counts(self) -> dict[str, int]:
        """The fields of ``ReplicaStats``."""
        return {
            "predicted_calls": self._paired.predicted,
            "missed_predictions": self._paired.missed,
            "skipped_forwards": self._cached.skipped,
        }
