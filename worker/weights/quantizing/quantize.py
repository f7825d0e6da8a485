"""Quantizes the linear layers of a component's repeated blocks, where most of its weights are.

Embeddings, norms, modulations outside the blocks and output layers keep their precision: they are small, and errors in
them are in every position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ....protocol.errors import StartFailed
from ....protocol.replicas import Quantized
from ...internals.blocks import NoBlocks, repeated_blocks
from ..checkpoint.layout import Entry, Layout
from .base import CheckpointFile, QuantizedWeight
from .layers import QuantizedLayer, become_quantized, quantized_class
from .schemes import Scheme

SMALLEST = 1024
"""Elements from which a weight is quantized."""


@torch.no_grad()
def quantize(
    name: str, component: nn.Module, layout: Layout, scheme: Scheme, dtype: torch.dtype, files: Sequence[Path]
) -> Quantized:
    """Quantize the component ``name`` in host memory. Its weights of ``dtype`` come from ``files``, if from any.

    Raises ``StartFailed`` if nothing in it can be quantized.
    """
    opened = [CheckpointFile(path) for path in files]
    layers = dict(_layers(name, component, scheme, dtype))
    entries: dict[str, list[Entry]] = {path: [] for path in layers}
    for entry in layout:
        owner, _, kind = entry.tensor.rpartition(".")
        if kind == "weight" and owner in entries:
            entries[owner].append(entry)
    before, after = 0, 0
    for path, (layer, cls) in layers.items():
        weight = layer.weight.detach()
        bases = [(entry, weight if entry.rows is None else weight[entry.rows]) for entry in entries[path]]
        if sum(len(base) for _, base in bases) != len(weight):
            continue  # the checkpoint has it in another form, in which an update could not write it
        become_quantized(layer, cls, scheme)
        assert isinstance(layer, QuantizedLayer)
        before, after = before + weight.nbytes, after + layer.codes.nbytes + layer.scale.nbytes
        for entry, base in bases:
            held = layout.codecs[entry.name] = QuantizedWeight(layer, entry.rows, base)
            held.leave_in_file(opened, layout, entry.name)
    if not before:
        raise _nothing(name, component, scheme, dtype)
    return Quantized(scheme.name, len(layers), before, after, _bytes_on_host(layout))


def _layers(
    name: str, component: nn.Module, scheme: Scheme, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[nn.Linear, type[QuantizedLayer]]]]:
    """The layers that can be quantized, by their paths. A weight that two layers share, or of another dtype, stays."""
    try:
        blocks = {path for found in repeated_blocks(component) for path in found.modules}
    except NoBlocks as error:
        raise StartFailed(f"--quantize: {name} cannot be quantized, because {error}.") from error
    uses = Counter(id(parameter) for _, parameter in component.named_parameters(remove_duplicate=False))
    for path, layer in component.named_modules():
        cls = quantized_class(layer, scheme) if any(f"{path}.".startswith(f"{block}.") for block in blocks) else None
        if cls is not None and isinstance(layer, nn.Linear):
            weight = layer.weight
            if weight.dtype == dtype and weight.numel() >= SMALLEST and uses[id(weight)] == 1:
                yield path, (layer, cls)


def _nothing(name: str, component: nn.Module, scheme: Scheme, dtype: torch.dtype) -> StartFailed:
    return StartFailed(
        f"--quantize: {name} ({type(component).__name__}) has no linear layer of {SMALLEST} or more elements in "
        f"{dtype} within its repeated blocks that {scheme.name} can quantize; leave it out."
    )


def _bytes_on_host(layout: Layout) -> int:
    """Bytes of the bases that are in no file."""
    return sum(
        one.base.nbytes for one in layout.codecs.values() if isinstance(one, QuantizedWeight) and not one.is_in_file
    )
