"""What a component's modules are besides their weights: attributes, sub-modules, hooks.

Some pipelines change these on the shared components during a call (attention processors, for one) and put them back
only if the call ends well. Such pipelines run one request at a time, and after each the modules are restored.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn


class ModuleState:
    """The state of all modules of a pipeline at the moment of its making. Tensors are referred to, not copied."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        components = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        modules = {id(module): module for component in components for module in component.modules()}
        self._saved = [(module, _shallow(vars(module))) for module in modules.values()]

    def restore(self) -> None:
        """Give every module back the attributes, sub-modules, parameters, buffers and hooks that it had."""
        for module, saved in self._saved:
            vars(module).clear()
            vars(module).update(_shallow(saved))


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes, with the plain dictionaries among them (``_modules``, ``_parameters``, hooks) copied as well."""
    plain = (dict, OrderedDict)
    return {name: value.copy() if type(value) in plain else value for name, value in attributes.items()}
