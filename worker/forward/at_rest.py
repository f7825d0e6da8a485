"""The components' attributes between forwards, restored when a forward fails halfway.

Some components keep state while they compute: the causal convolutions of video autoencoders keep the last frames for
the next ones, and drop them at the end. One that runs out of memory halfway would begin the next clip, or a retry in a
smaller forward, with stale frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..crossing.overlay import overlay_attributes

_LEFT_ALONE = frozenset(vars(nn.Module()))
"""Parameters, buffers, sub-modules and hooks: operations may write to them, forwards do not."""


class AtRest:
    """The attributes of every module of ``components``, taken while no forward runs. Holds references, no copies."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._kept = {
            name: [(part, _own(part)) for part in component.modules()] for name, component in components.items()
        }

    def restore(self, component: str) -> None:
        """Restore the attributes of ``component``; an unknown name has none."""
        for part, before in self._kept.get(component, ()):
            attributes = vars(part)
            for name in _own(part).keys() - before.keys():
                del attributes[name]
            attributes |= before


def _own(part: nn.Module) -> dict[str, Any]:
    """The attributes of ``part`` that a forward may write; an overlay's is not among them."""
    left_alone = _LEFT_ALONE | overlay_attributes(part)
    return {name: value for name, value in vars(part).items() if name not in left_alone}
