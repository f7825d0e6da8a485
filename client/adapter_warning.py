"""Warn a trainer whose server generates with adapters besides the weights that it sent."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection

from .results import WeightUpdate

log = logging.getLogger(__name__)


class OffPolicy(UserWarning):
    """The server samples with adapters on top of the trainer's weights."""


def warn_of_adapters(update: WeightUpdate, own: Collection[str] = (), *, stacklevel: int) -> None:
    """Warn if adapters other than the trainer's ``own`` are active for all requests.

    ``stacklevel`` is that of :func:`warnings.warn`, counted from the caller of this function.
    """
    named = [
        f"{one.nickname} ({'merged into' if one.merged else 'dynamic in'} {component}, strength {one.strength:g})"
        for component, ones in update.adapters.items()
        for one in ones
        if (one.merged or one.mode == "dynamic") and one.strength and one.nickname not in own
    ]
    if not named:
        return
    message = (
        f"The server samples with the new weights and with {', '.join(named)}, so its rollouts are off-policy: their "
        "log-probabilities are not those of the weights that were sent. Unload the adapters, or unmerge them."
    )
    log.warning("%s", message)
    warnings.warn(message, OffPolicy, stacklevel=stacklevel + 1)
