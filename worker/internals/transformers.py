"""Undocumented names of transformers that workers use."""

from __future__ import annotations

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
