"""The components' attributes between forwards, restored when a forward fails halfway.

Some components keep state while they compute: the causal convolutions of video autoencoders keep the last frames for
the next ones, and drop them at the end. One that runs out of memory halfway would begin the next clip, or a retry in a
smaller forward, with stale frames.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..crossing.overlay import own_attributes


class AtRest:
    """The attributes of every module of ``components``, taken while no forward runs. Holds references, no copies.

    Parameters, buffers, sub-modules and hooks are left alone: operations may write to them, forwards do not.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._kept = {
            name: [(part, own_attributes(part)) for part in component.modules()]
            for name, component in components.items()
        }

    def restore(self, component: str) -> None:
        """Restore the attributes of ``component``; an unknown name has none."""
        for part, before in self._kept.get(component, ()):
            attributes = vars(part)
            for name in own_attributes(part).keys() - before.keys():
                del attributes[name]
            attributes |= before
