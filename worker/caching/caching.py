"""Saving forwards of a rank's requests: the options in force, and counts."""

from __future__ import annotations

from collections.abc import Mapping

from ...protocol.generation import Generate
from .guidance_pairing import GuidancePairing, PairingCounts


class Caching:
    """Makes the interceptors of requests. ``unmergeable`` names the calls that cannot share forwards."""

    def __init__(self, *, pairs: bool, unmergeable: Mapping[str, str]) -> None:
        self._pairs = pairs
        self._unmergeable = unmergeable
        self._pairing_counts = PairingCounts()

    def pairing(self, request: Generate) -> GuidancePairing | None:
        """Guidance pairing for ``request``, unless a trainer will repeat its calls one by one."""
        if not self._pairs or request.deterministic or request.rollout is not None:
            return None
        return GuidancePairing(self._pairing_counts, self._unmergeable)

    def counts(self) -> dict[str, int]:
        """The fields of ``ReplicaStats``."""
        counts = self._pairing_counts
        return {"predicted_calls": counts.predicted, "missed_predictions": counts.missed}
