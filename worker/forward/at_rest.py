"""The components' attributes between forwards, restored when a forward fails halfway.

Some components keep state while they compute: the causal convolutions of video autoencoders keep the last frames for
the next ones, and drop them at the end. One that runs out of memory halfway would begin the next clip, or a retry in a
smaller forward, with stale frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..lora.layers import LORA

_LEFT_ALONE = frozenset(vars(nn.Module())) | {LORA}
"""Parameters, buffers, sub-modules, hooks and adapters: operations may write to them, forwards do not."""


class AtRest:
    """The attributes of every module of ``components``, taken while no forward runs. Holds references, no copies."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._kept = {
            name: [(vars(part), _own(vars(part))) for part in component.modules()]
            for name, component in components.items()
        }

    def restore(self, component: str) -> None:
        """Restore the attributes of ``component``; an unknown name has none."""
        for attributes, before in self._kept.get(component, ()):
            for name in _own(attributes).keys() - before.keys():
                del attributes[name]
            attributes |= before


def _own(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in _LEFT_ALONE}
