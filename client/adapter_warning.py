"""A warning to trainers whose server draws with more than the weights that they sent."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection

from .results import WeightUpdate

log = logging.getLogger(__name__)


class OffPolicy(UserWarning):
    """The server's samples are drawn by other weights than the trainer's: by these and by adapters."""


def warn_of_adapters(update: WeightUpdate, own: Collection[str] = (), *, stacklevel: int) -> None:
    """Warn where adapters other than the trainer's ``own`` have a part in everything that the server draws now.

    ``stacklevel`` is that of :func:`warnings.warn`, counted from the caller of this function.
    """
    named = [
        f"{one.nickname} ({'merged into' if one.merged else 'computed beside'} {component}, strength {one.strength:g})"
        for component, ones in update.adapters.items()
        for one in ones
        if (one.merged or one.mode == "dynamic") and one.strength and one.nickname not in own
    ]
    if not named:
        return
    message = (
        f"The server draws by the new weights and by {', '.join(named)}, so that its rollouts are off-policy: their "
        "log-probabilities are not those of the weights that were sent. Unload the adapters, or unmerge them."
    )
    log.warning("%s", message)
    warnings.warn(message, OffPolicy, stacklevel=stacklevel + 1)
