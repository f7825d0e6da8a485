"""Verify a part of a model that was made faster, by the rule for whole components."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .measures import distance
from .policy import Policy


def judge(
    policy: Policy,
    found: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor] | None,
) -> str | None:
    """The first violated threshold of any tensor; ``None`` if all hold.

    With a ``reference`` in fp64, ``found`` may be at most as far from it as the policy allows beside ``plain``. Without
    one, ``found`` is compared with ``plain``.
    """
    for index, one in enumerate(found):
        if reference is None:
            fault = policy.fault(distance([one], [plain[index]]), None)
        else:
            exact = reference[index]
            fault = policy.fault(distance([one], [exact]), distance([plain[index]], [exact]))
        if fault is not None:
            return fault
    return None
