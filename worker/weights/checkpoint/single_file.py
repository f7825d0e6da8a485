"""Single-file checkpoints: diffusers converts their tensors to its own names and shapes, component by component.

The pipeline that the file belongs to, its *base*, provides the configurations, the tokenizers and the components that
are not in the file. GGUF tensors are dequantized once, at load, to the values that diffusers computes in each forward;
afterwards they need as much memory as those of any other file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FromOriginalModelMixin, GGUFQuantizationConfig
from torch import nn
from transformers import PreTrainedModel

from ....formats.checkpoint import GGUF
from ....formats.model_names import resolve_model
from ....formats.pipeline_index import read_index
from ....protocol.errors import StartFailed
from ...internals import diffusers as internals
from ...internals import transformers as transformers_internals
from ...pipelines.components import DENOISERS
from .components import Component
from .download import download_configurations, download_pipeline

log = logging.getLogger(__name__)

_AUTOENCODERS = ("first_stage_model.", "vae.")
"""Prefixes of an autoencoder's tensor names in a file that holds more than the denoiser."""


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A file's tensors by the file's names, and the directory of its base.

    ``denoiser`` is the component that every such file holds; of two denoisers, the first.
    """

    file: Path
    base: Path
    denoiser: str
    tensors: Mapping[str, torch.Tensor]

    def has(self, component: Component) -> bool:
        """True if the component's weights are in the file."""
        if issubclass(component.cls, PreTrainedModel):
            return bool(internals.is_clip_model_in_single_file(component.cls, self.tensors)) or (
                component.cls.__name__ == "T5EncoderModel" and bool(internals.is_t5_in_single_file(self.tensors))
            )
        if not issubclass(component.cls, FromOriginalModelMixin):
            return False
        return component.name == self.denoiser or (component.name not in DENOISERS and _is_whole(self.tensors))

    def leaves_out(self, component: Component) -> bool:
        """True if diffusers omits the component when a whole pipeline is in one file."""
        return component.name in internals.SINGLE_FILE_OPTIONAL_COMPONENTS and _is_whole(self.tensors)

    def load(self, component: Component, dtype: torch.dtype) -> nn.Module:
        """The component on the CPU, as diffusers loads it. Raises ``StartFailed`` where the file does not fit."""
        quantized = {"quantization_config": GGUFQuantizationConfig(dtype)} if self.file.suffix == GGUF else {}
        try:
            made: nn.Module = internals.load_single_file_sub_model(
                library_name=component.cls.__module__,
                class_name=component.cls.__name__,
                name=component.name,
                checkpoint=dict(self.tensors),  # conversions pop tensors from it
                pipelines=diffusers.pipelines,
                is_pipeline_module=False,
                cached_model_config_path=str(self.base),
                torch_dtype=dtype,
                local_files_only=True,
                **quantized,
            )
        except NotImplementedError as error:  # from torch, for parameters without a tensor
            raise self._does_not_fit(component, "tensors are missing") from error
        except (LookupError, ValueError, RuntimeError, AttributeError, internals.SingleFileComponentError) as error:
            said = (str(error).strip().splitlines() or [""])[0]
            raise self._does_not_fit(component, f"{type(error).__name__}: {said}") from error
        if isinstance(made, PreTrainedModel):
            made.tie_weights()  # diffusers reads one name of tied tensors, and leaves the others without values
        if any(parameter.is_meta for parameter in made.parameters()):
            raise self._does_not_fit(component, "tensors are missing")
        # diffusers leaves a T5 in training mode, in which dropout draws another picture each time
        return (_dequantized(made) if quantized else made).eval()

    def _does_not_fit(self, component: Component, why: str) -> StartFailed:
        return StartFailed(
            f"{self.file} does not fit {component.name} as {self.base} configures it ({why}); give the pipeline that "
            "it belongs to with --base-pipeline."
        )


def _dequantized(made: Any) -> nn.Module:
    """The module with dequantized tensors in place of the quantized ones."""
    restored: nn.Module = internals.dequantize_gguf_and_restore_linear(made, made.hf_quantizer.modules_to_not_convert)
    del made.hf_quantizer
    return restored


def saved_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's tensors under the names that ``save_pretrained`` would give them."""
    tensors = dict(module.state_dict())
    if not isinstance(module, PreTrainedModel):
        return tensors
    tied = set(module.all_tied_weights_keys or {})
    kept = {name: tensor for name, tensor in tensors.items() if name not in tied}
    reverted: dict[str, torch.Tensor] = transformers_internals.revert_weight_conversion(module, kept)
    return reverted


def open_single_file(file: Path, base: str | None, revision: str | None) -> SingleFile:
    """The file and its base, downloaded where it is not on this machine. Raises ``StartFailed``."""
    try:
        tensors: dict[str, torch.Tensor] = internals.load_single_file_checkpoint(str(file))
    except (ValueError, OSError) as error:
        raise StartFailed(f"{file} cannot be read: {str(error).strip().splitlines()[0].rstrip('.')}.") from error
    directory = _find_base(file, base, tensors, revision)
    found = read_index(directory).values
    denoiser = next((name for name in DENOISERS if found.get(name, [None])[0] is not None), None)
    if denoiser is None:
        raise StartFailed(f"The base pipeline {directory} has no denoiser that {file} could hold.")
    return SingleFile(file, directory, denoiser, tensors)


def _find_base(file: Path, base: str | None, tensors: Mapping[str, Any], revision: str | None) -> Path:
    found = resolve_model(base if base is not None else _guess(tensors))
    if isinstance(found, Path):
        return found
    try:
        if _is_whole(tensors):
            return download_configurations(found, revision=revision)
        return download_pipeline(found, revision=revision, without=("transformer", "unet"))
    except StartFailed as failed:
        if base is not None:
            raise
        raise StartFailed(
            f"{failed.message.rstrip('.')}. By its tensors, {file} belongs to {found}; "
            "give the directory of that pipeline, or of the right one, with --base-pipeline."
        ) from failed


def _guess(tensors: Mapping[str, Any]) -> str:
    """The repository of the base, guessed by diffusers from names and shapes of the tensors."""
    name: str = internals.fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
    return name


def _is_whole(tensors: Mapping[str, Any]) -> bool:
    """True if the file holds more than the denoiser."""
    return any(name.startswith(_AUTOENCODERS) for name in tensors)
