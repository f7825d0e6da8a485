"""An adapter's file: read in whatever format it is, checked against the model, and given in the model's own names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...protocol.adapters import ADAPTER_CONFIG, ADAPTER_FILE
from ...protocol.errors import InvalidRequest
from ...protocol.tensor_files import BadTensorFile, read_metadata
from ..weights.sources import map_file
from .alphas import Told, parse_object, read_config, read_header, scaled
from .pairs import Pair, find_pairs, refused
from .parts import layer_of, read_notes
from .places import Shapes, place, split_name, weight_shapes

__all__ = ["AdapterFile", "LowRank", "load_adapter", "read_adapter", "weight_shapes"]


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one layer: ``scale * up @ down``, float32.

    ``down`` is [rank, in], of a convolution [rank, in, *kernel]; ``up`` is [out, rank], or [out, rank, 1, ...].
    ``alpha`` is the one that applies, and ``scale`` is alpha / rank, or with rank-stabilised LoRA alpha / sqrt(rank);
    of a layer that the file has fused with others, the rank is that which they have together.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The pairs by component and layer. ``rank`` is the largest, ``alpha`` that of most layers, ``nbytes`` the size of
    all factors."""

    layers: dict[str, dict[str, LowRank]]
    rank: int
    alpha: float
    nbytes: int


def load_adapter(
    folder: Path, pipeline: DiffusionPipeline, shapes: Shapes, *, alpha: float | None = None
) -> AdapterFile:
    """Read the server's copy of an adapter. Raises ``InvalidRequest``."""
    file, beside = folder / ADAPTER_FILE, folder / ADAPTER_CONFIG
    try:
        config = parse_object(beside.read_bytes(), ADAPTER_CONFIG) if beside.exists() else None
        tensors = map_file(file)
        with file.open("rb") as stream:
            metadata = read_metadata(stream, os.fstat(stream.fileno()).st_size)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, field="lora_path") from None
    except BadTensorFile as error:
        raise refused(f"{error}") from None
    except OSError as error:
        raise refused(f"{folder.name} cannot be read: {error.strerror}") from None
    alphas = notes.alphas if (notes := read_notes(folder)) is not None else {}
    return read_adapter(tensors, config, pipeline, shapes, alpha=alpha, alphas=alphas, metadata=metadata)


def read_adapter(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    pipeline: DiffusionPipeline,
    shapes: Shapes,
    *,
    alpha: float | None = None,
    alphas: Mapping[str, float] = MappingProxyType({}),
    metadata: Mapping[str, str] | None = None,
) -> AdapterFile:
    """The adapter of these tensors, with ``config`` that lay beside them and the ``metadata`` of their header.

    ``alpha`` is for all layers, and ``alphas`` are for some, whatever the file says. Otherwise a layer's own applies,
    else the configuration's, else the header's, else the rank. Raises ``InvalidRequest``.
    """
    if alpha is not None and not 0 < alpha < float("inf"):
        raise refused(f"an alpha of {alpha} is no positive number", field="lora_alpha")
    told = None if config is None else read_config(config)
    by_component = read_header(metadata or {})
    pairs = {
        name: replace(pair, alpha=alphas.get(layer_of(f"{name}.alpha"), pair.alpha))
        for name, pair in find_pairs(tensors).items()
    }
    placed = place(pairs, pipeline, shapes)  # before patterns meet names, so that these are a model's
    scales: dict[str, tuple[float, float]] = {}
    other: list[str] = []
    for name in (name for found in placed.values() for name in found.layers):
        (component, layer), pair = split_name(name, shapes), pairs[name]
        said = told or by_component.get(component)
        if said is not None and said.rank_of(layer) != pair.rank:
            other.append(f"{layer}: {said.rank_of(layer):g}, not {pair.rank}")
        scales[name] = _scale(layer, pair, said, alpha)
    if other:
        raise refused(f"of {len(other)} layers, another rank is told than they have", other)
    layers: dict[str, dict[str, LowRank]] = {}
    for (component, layer), found in placed.items():
        applies = {scales[name] for name in found.layers}
        if len(applies) != 1:
            raise refused("layers of different alphas or ranks are one in the model", sorted(found.layers))
        layers.setdefault(component, {})[layer] = LowRank(found.down, found.up, *applies.pop())
    every = [pair for named in layers.values() for pair in named.values()]
    return AdapterFile(
        layers=layers,
        rank=max(pair.rank for pair in every),
        alpha=Counter(pair.alpha for pair in every).most_common(1)[0][0],
        nbytes=sum(pair.down.nbytes + pair.up.nbytes for pair in every),
    )


def _scale(layer: str, pair: Pair, told: Told | None, given: float | None) -> tuple[float, float]:
    """The alpha that applies to a pair, and the scale that follows."""
    alpha = given if given is not None else pair.alpha
    if alpha is None:
        alpha = float(pair.rank) if told is None else told.alpha_of(layer)
    return float(alpha), scaled(pair.rank, alpha, told)
