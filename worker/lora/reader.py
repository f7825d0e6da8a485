"""Adapters as they come to a rank: read from the server's copies, and written again with what came last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from ...formats.digests import STORED_DTYPES
from ...protocol.adapters import AdapterSource, AdapterState
from ...protocol.errors import Unavailable
from ...protocol.operations import Save
from ...protocol.reports import Report
from ..weights.checkpoint.layout import Layout
from .adapter import Adapter, placed
from .files import AdapterFile, load_adapter, read_adapter
from .names import Shapes, weight_shapes
from .pairs import refused
from .parts import Part, Parts, has_whole_layers, joined, layer_of, of_module, read_parts, write_parts


@dataclass(frozen=True, slots=True)
class AdapterReader:
    """Reads adapters for ``components`` of the pipeline onto ``device``."""

    pipeline: DiffusionPipeline
    components: Mapping[str, nn.Module]
    layouts: Mapping[str, Layout]
    device: torch.device

    def load(self, source: AdapterSource) -> tuple[AdapterFile, Adapter]:
        """Raises ``InvalidRequest``, and ``Unavailable`` without memory for it."""
        file = self._file(source)
        try:
            return file, placed(file, source.nickname, source.target, self.components, self.layouts, self.device)
        except torch.OutOfMemoryError as error:
            raise Unavailable("There is no memory for the adapter; unload another.") from error

    def keep(self, save: Save, tensors: Mapping[str, torch.Tensor], state: AdapterState) -> Report:
        """Write an adapter that comes in parts, with one more. Raises ``InvalidRequest``, and ``Unavailable``."""
        unfit = [name for name, one in tensors.items() if one.is_complex() or str(one.dtype) not in STORED_DTYPES]
        if unfit:
            dtypes = ", ".join(sorted({str(tensors[name].dtype) for name in unfit}))
            raise refused(f"no adapter has tensors of {dtypes}", unfit, field="serialized_named_tensors")
        loaded = state.loaded.get(save.adapter.nickname) if save.update_id is None else None
        before = save.onto if loaded is None else loaded.source.folder
        part = Part(
            of_module(tensors, save.adapter.target),
            version=save.version,
            alpha=save.alpha,
            rank=save.rank,
            complete=save.complete,
            begun=save.update_id is not None,
        )
        parts, told = joined(Parts() if before is None else read_parts(Path(before)), part)
        if part.begun and parts.tensors:  # else the next step reads it
            read_adapter(parts.tensors, None, self.pipeline, self._shapes(), alphas=parts.notes.alphas)
        try:
            write_parts(parts, Path(save.adapter.folder))
        except (OSError, SafetensorError) as error:
            raise Unavailable(f"The adapter could not be kept in shared memory ({error}).") from error
        layers = {layer_of(name) for name in parts.tensors}
        return Report(updated={save.adapter.target: len(layers)}, waiting=sorted(parts.waiting), notes=told)

    def _file(self, source: AdapterSource) -> AdapterFile:
        folder = Path(source.folder)
        if not has_whole_layers(folder):
            return AdapterFile({source.target: {}}, rank=0, alpha=0.0)
        return load_adapter(folder, self.pipeline, self._shapes(), alpha=source.alpha, strict=source.strict)

    def _shapes(self) -> Shapes:
        return weight_shapes({name: self.layouts[name] for name in self.components})
