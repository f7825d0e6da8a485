"""An adapter in plain diffusers and peft, and as this runtime reads it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from safelight.protocol.adapters import ADAPTER_FILE
from safelight.tests.tiny import FAMILIES
from safelight.worker.lora.files import AdapterFile, load_adapter, weight_shapes
from safelight.worker.weights.checkpoint.layout import Layout

Deltas = dict[tuple[str, str], torch.Tensor]
"""The differences of weights, by component and layer."""


def modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def shapes_of(pipeline: DiffusionPipeline) -> dict[str, dict[str, tuple[int, ...]]]:
    return weight_shapes({name: Layout.whole(module) for name, module in modules(pipeline).items()})


def written(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def by_diffusers(name: str, path: Path) -> Deltas:
    """From the layers that ``load_lora_weights`` makes of the file."""
    pipeline: Any = FAMILIES[name].build()
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return of_layers(modules(pipeline))


def of_layers(components: dict[str, nn.Module]) -> Deltas:
    found: Deltas = {}
    for component, module in components.items():
        for layer, part in module.named_modules():
            if isinstance(part, LoraLayer):
                (adapter,) = part.lora_A
                found[component, layer] = part.get_delta_weight(adapter).detach()  # type: ignore[operator]
    return found


def read(name: str, path: Path, **options: Any) -> AdapterFile:
    pipeline = FAMILIES[name].build()
    if path.is_file():  # by itself, as the server copies it
        folder = Path(tempfile.mkdtemp(dir=path.parent))
        (folder / ADAPTER_FILE).hardlink_to(path)
        path = folder
    return load_adapter(path, pipeline, shapes_of(pipeline), **options)


def deltas(file: AdapterFile) -> Deltas:
    """``scale * up @ down`` of every layer."""
    found: Deltas = {}
    for component, layers in file.layers.items():
        for layer, pair in layers.items():
            product = pair.scale * (pair.up.flatten(1) @ pair.down.flatten(1))
            found[component, layer] = product.reshape(len(product), *pair.down.shape[1:])
    return found


def assert_same(ours: Deltas, theirs: Deltas, relative: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    assert theirs
    for place, delta in theirs.items():
        size = delta.norm()
        assert size > 0, place
        assert ours[place].shape == delta.shape, place
        assert (ours[place] - delta).norm() <= relative * size, place
