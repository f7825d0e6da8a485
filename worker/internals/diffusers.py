"""Undocumented names of diffusers that workers use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models import attention_dispatch

from .lookup import lookup

CHECKED = "0.42.1"

NAMES = {
    # classes and files of a pipeline's directory
    "ALL_IMPORTABLE_CLASSES": "diffusers.pipelines.pipeline_loading_utils:ALL_IMPORTABLE_CLASSES",
    "get_class_obj_and_candidates": "diffusers.pipelines.pipeline_loading_utils:get_class_obj_and_candidates",
    "identify_model_variants": "diffusers.pipelines.pipeline_loading_utils:_identify_model_variants",
    # single-file checkpoints
    "SINGLE_FILE_LOADABLE_CLASSES": "diffusers.loaders.single_file_model:SINGLE_FILE_LOADABLE_CLASSES",
    "SINGLE_FILE_OPTIONAL_COMPONENTS": "diffusers.loaders.single_file:SINGLE_FILE_OPTIONAL_COMPONENTS",
    "load_single_file_sub_model": "diffusers.loaders.single_file:load_single_file_sub_model",
    "SingleFileComponentError": "diffusers.loaders.single_file_utils:SingleFileComponentError",
    "fetch_diffusers_config": "diffusers.loaders.single_file_utils:fetch_diffusers_config",
    "is_clip_model_in_single_file": "diffusers.loaders.single_file_utils:is_clip_model_in_single_file",
    "is_t5_in_single_file": "diffusers.loaders.single_file_utils:is_t5_in_single_file",
    "load_single_file_checkpoint": "diffusers.loaders.single_file_utils:load_single_file_checkpoint",
    "dequantize_gguf_and_restore_linear": "diffusers.quantizers.gguf.utils:_dequantize_gguf_and_restore_linear",
    # adapters
    "LoraBaseMixin": "diffusers.loaders.lora_base:LoraBaseMixin",
    "StateDictType": "diffusers.utils.state_dict_utils:StateDictType",
    "convert_state_dict_to_peft": "diffusers.utils:convert_state_dict_to_peft",
    "convert_unet_state_dict_to_peft": "diffusers.utils:convert_unet_state_dict_to_peft",
    # tensor-parallel plans
    "PackedColwiseParallel": "diffusers.hooks.tensor_parallel:PackedColwiseParallel",
    "PackedRowwiseParallel": "diffusers.hooks.tensor_parallel:PackedRowwiseParallel",
    "flux_plan": "diffusers:FluxTransformer2DModel._tp_plan",
    "flux2_plan": "diffusers:Flux2Transformer2DModel._tp_plan",
    "qwen_image_plan": "diffusers:QwenImageTransformer2DModel._tp_plan",
    # sequence parallelism
    "Attention": "diffusers.models.attention_processor:Attention",
    "AttentionModuleMixin": "diffusers.models.attention:AttentionModuleMixin",
    "ContextParallelConfig": "diffusers.models._modeling_parallel:ContextParallelConfig",
    "ContextParallelOutput": "diffusers.models._modeling_parallel:ContextParallelOutput",
    "ParallelConfig": "diffusers.models._modeling_parallel:ParallelConfig",
    "all_to_all_single": "diffusers.models.attention_dispatch:_all_to_all_single",
    # settings of the process
    "AttentionBackendRegistry": "diffusers.models.attention_dispatch:_AttentionBackendRegistry",
}

__getattr__ = lookup("diffusers", CHECKED, NAMES)


def use_exchange(exchange: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have attention that has equal parts of a sequence exchange them by ``exchange``, instead of diffusers' own."""
    __getattr__("all_to_all_single")  # raises if this release has another way
    vars(attention_dispatch)["_all_to_all_single"] = lambda tensor, _: exchange(tensor)
