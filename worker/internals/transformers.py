"""Undocumented names of transformers that workers use."""

from __future__ import annotations

from torch import nn

from .lookup import lookup

CHECKED = "5.23.0"

NAMES = {
    "WeightConverter": "transformers.core_model_loading:WeightConverter",
    "WeightRenaming": "transformers.core_model_loading:WeightRenaming",
    "get_model_conversion_mapping": "transformers.conversion_mapping:get_model_conversion_mapping",
    "rename_source_key": "transformers.core_model_loading:rename_source_key",
    "active_collector": "transformers.utils.output_capturing:_active_collector",
    "revert_weight_conversion": "transformers.core_model_loading:revert_weight_conversion",
}

__getattr__ = lookup("transformers", CHECKED, NAMES)


def collects_within_layers() -> bool:
    """True while a call of a model of transformers collects more than what its layers return, by hooks within them."""
    collected = __getattr__("active_collector").get()
    return bool(collected) and any(name != "hidden_states" and not name.startswith("_") for name in collected)


def remove_collecting_hooks(module: nn.Module) -> None:
    """Remove the hooks that transformers has put into ``module`` and its parts to collect what they return."""
    for part in module.modules():
        for key, hook in [*part._forward_hooks.items()]:
            if hook.__module__ == "transformers.utils.output_capturing":
                del part._forward_hooks[key]
