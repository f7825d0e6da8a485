"""The components' attributes between forwards, put back when a forward fails halfway.

Some components keep things in themselves while they compute: causal convolutions of video autoencoders keep the last
frames for the next ones, and forget them at the end. One that runs out of memory before its end would begin the next
clip, or the same one in a smaller forward, with the frames of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..lora.layers import LORA

_LEFT_ALONE = frozenset(vars(nn.Module())) | {LORA}
"""Parameters, buffers, sub-modules, hooks and adapters, which a forward does not write to, and operations may."""


class AtRest:
    """What every module of ``components`` holds now, while no forward is in progress. Tensors are referred to."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._kept = {
            name: [(vars(part), _own(vars(part))) for part in component.modules()]
            for name, component in components.items()
        }

    def restore(self, component: str) -> None:
        """Put the attributes of this component back as they were; one by an unknown name has none."""
        for attributes, before in self._kept.get(component, ()):
            for name in _own(attributes).keys() - before.keys():
                del attributes[name]
            attributes |= before


def _own(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in _LEFT_ALONE}
