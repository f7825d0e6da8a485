"""An adapter's file: read in whatever format it is, checked against the model, and given in the model's own names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...formats.tensor_files import BadTensorFile, read_metadata
from ...protocol.adapters import ADAPTER_CONFIG, ADAPTER_FILE
from ...protocol.errors import InvalidRequest
from ..weights.checkpoint.mapped_files import map_file
from .alphas import AlphaConfig, parse_object, read_config, read_header, scaled
from .convert import Converted
from .matching import ABSENT, fault_of, match_layers
from .names import LayerRef, Shapes, split_name, weight_shapes
from .pairs import ALPHA, LeftOut, Pair, find_pairs, refused
from .parts import layer_of, read_notes
from .targets import find_targets
from .whole import Whole, decomposed, of_pair, take_magnitudes, take_whole

__all__ = ["AdapterFile", "LowRank", "load_adapter", "read_adapter", "weight_shapes"]


_COPIED_WITHIN = 1e-3
"""The largest difference of a layer's copies, in the relative norm: a file rounds each of them."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one layer: ``scale * up @ down``, float32.

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
class WholeChange:
    """A change of one weight or bias of the model, ``scale`` times ``whole``, which can only be merged.

    ``rows`` are those of the file's layer that this one has; all of them where ``None``.
    """

    component: str
    layer: str
    whole: Whole
    scale: float
    rows: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The pairs by component and layer, and other changes.

    ``rank`` is the largest, and ``alpha`` that of most layers. ``left`` names layers that the model lacks.
    """

    layers: dict[str, dict[str, LowRank]]
    rank: int
    alpha: float
    changes: list[WholeChange] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        pairs = sum(pair.down.nbytes + pair.up.nbytes for named in self.layers.values() for pair in named.values())
        return pairs + sum(change.whole.nbytes for change in self.changes)

    @property
    def components(self) -> list[str]:
        return list(dict.fromkeys([*self.layers, *(change.component for change in self.changes)]))


def load_adapter(
    folder: Path, pipeline: DiffusionPipeline, shapes: Shapes, *, alpha: float | None = None, strict: bool = True
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
    return read_adapter(tensors, config, pipeline, shapes, alpha=alpha, alphas=alphas, metadata=metadata, strict=strict)


def read_adapter(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    pipeline: DiffusionPipeline,
    shapes: Shapes,
    *,
    alpha: float | None = None,
    alphas: Mapping[str, float] = MappingProxyType({}),
    metadata: Mapping[str, str] | None = None,
    strict: bool = True,
) -> AdapterFile:
    """The adapter of these tensors, with the ``config`` beside them and the ``metadata`` of their header.

    ``alpha`` is for all layers, and ``alphas`` are for some, whatever the file says. Otherwise a layer's own applies,
    else the configuration's, else the header's, else the rank. Layers that the model lacks are refused if
    ``strict``, else left out. Raises ``InvalidRequest``.
    """
    if alpha is not None and not 0 < alpha < float("inf"):
        raise refused(f"an alpha of {alpha} is not a positive number", field="lora_alpha")
    scaling = _Scaling(
        None if config is None else read_config(config), read_header(metadata or {}), alpha, alphas, shapes
    )
    left = LeftOut(strict)
    pairs, wholes = _read(tensors, left)
    scaling.check_kinds(wholes)
    matched = match_layers(pairs, pipeline, shapes, left)  # before patterns meet names, so that these are a model's
    changes = _changes(wholes, pairs, pipeline, shapes, left)
    for name in dict.fromkeys(name for _, pair in matched for name in pair.layers):
        scaling.add(name, pairs[name].rank, pairs[name].alpha)
    layers = _layers(matched, scaling)
    scaled = [(where, rows, whole, *scaling.of_whole(whole)) for where, rows, whole in changes]
    scaling.check_ranks()
    file = _adapter_file(layers, scaled, left)
    if not file.components:
        raise refused("the model has none of its layers", left.names)
    return file


def _adapter_file(
    layers: dict[str, dict[str, LowRank]],
    scaled: list[tuple[LayerRef, torch.Tensor | None, Whole, float, float]],
    left: LeftOut,
) -> AdapterFile:
    """``scaled`` are changes with their layers, rows, alphas and scales."""
    used = [(pair.alpha, pair.rank) for named in layers.values() for pair in named.values()]
    used += [(alpha, whole.rank) for _, _, whole, alpha, _ in scaled if whole.rank is not None]
    return AdapterFile(
        layers=layers,
        rank=max((rank for _, rank in used), default=0),
        alpha=Counter(alpha for alpha, _ in used).most_common(1)[0][0] if used else 0.0,
        changes=[WholeChange(*where, whole, scale, rows) for where, rows, whole, _, scale in scaled],
        left=sorted(set(left.names)),
    )


def _read(tensors: Mapping[str, torch.Tensor], left: LeftOut) -> tuple[dict[str, Pair], list[Whole]]:
    """Pairs of factors and changes of whole weights, by the file's names."""
    magnitudes, rest = take_magnitudes(tensors)
    wholes, rest = take_whole(rest)
    pairs = find_pairs(rest, left, required=not (wholes or magnitudes or left.names))
    if alone := [layer for layer in magnitudes if layer not in pairs]:
        raise refused(f"{len(alone)} magnitudes of DoRA have no pair of factors", alone)
    if alone := [one.layer for one in wholes if one.kind == "bias" and one.layer not in pairs]:
        raise refused(f"{len(alone)} biases of factors have no pair", alone)
    wholes = [of_pair(one, pairs[one.layer]) if one.kind == "bias" else one for one in wholes]
    wholes += [decomposed(layer, pairs.pop(layer), magnitude) for layer, magnitude in magnitudes.items()]
    return pairs, wholes


def _changes(
    wholes: list[Whole], pairs: Mapping[str, Pair], pipeline: DiffusionPipeline, shapes: Shapes, left: LeftOut
) -> list[tuple[LayerRef, torch.Tensor | None, Whole]]:
    if not wholes:
        return []
    targets = find_targets({one.layer: one.shape[0] for one in wholes}, pairs, pipeline, shapes)
    if absent := sorted({one.layer for one in wholes if one.layer not in targets}):
        left.out(f"it has {len(absent)} {ABSENT}", absent)
    found = [(target.where, target.rows, one) for one in wholes for target in targets.get(one.layer, ())]
    faults = (fault_of(one, where, one.shape[0] if rows is None else len(rows), shapes) for where, rows, one in found)
    if unfit := [fault for fault in faults if fault is not None]:
        raise refused(f"{len(unfit)} of its changes do not fit the model's weights", unfit)
    counted = Counter((where, one.parameter, one.kind) for where, _, one in found)
    if twice := [f"{where[0]}.{where[1]} ({kind})" for (where, _, kind), number in counted.items() if number > 1]:
        raise refused("it has a change twice", twice)
    return found


def _layers(matched: list[tuple[LayerRef, Converted]], scaling: _Scaling) -> dict[str, dict[str, LowRank]]:
    """The pairs by the model's layers. Copies of a layer, as in a fused one and its parts, count once."""
    layers: dict[str, dict[str, LowRank]] = {}
    names: dict[LayerRef, frozenset[str]] = {}
    for where, found in matched:
        pair = LowRank(found.down, found.up, *scaling.of_pairs(found.layers))
        named = layers.setdefault(where[0], {})
        if where[1] in named and not _is_copy(named[where[1]], pair):
            raise refused("it has a layer twice", [*sorted(names[where]), *sorted(found.layers)])
        named.setdefault(where[1], pair)
        names.setdefault(where, found.layers)
    return layers


def _is_copy(one: LowRank, other: LowRank) -> bool:
    products = [pair.scale * pair.up.flatten(1) @ pair.down.flatten(1) for pair in (one, other)]
    return bool((products[0] - products[1]).norm() <= _COPIED_WITHIN * products[0].norm())


@dataclass(slots=True)
class _Scaling:
    """The scale of each layer's change, by the request, the layer, the configuration or the header."""

    config: AlphaConfig | None
    by_component: Mapping[str, AlphaConfig]
    alpha: float | None
    alphas: Mapping[str, float]
    shapes: Shapes
    _scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    _other: list[str] = field(default_factory=list)

    def check_kinds(self, wholes: list[Whole]) -> None:
        """Raises ``InvalidRequest`` if the configuration is for another kind of changes than the file has."""
        kinds = {one.kind for one in wholes}
        for config in (self.config, *self.by_component.values()):
            if config is not None and config.kind is not None and config.kind not in kinds:
                raise refused(f"{config.where} is of {config.kind}, and the file has none")

    def add(self, layer: str, rank: int, own: float | None) -> tuple[float, float]:
        """The alpha that applies to a layer of the file, and the scale that follows."""
        component, name = split_name(layer, self.shapes)
        config = self.config or self.by_component.get(component)
        if config is not None and config.rank_of(name) != rank:
            self._other.append(f"{name}: {config.rank_of(name):g}, not {rank}")
        given = self.alpha if self.alpha is not None else self.alphas.get(layer_of(f"{layer}{ALPHA}"), own)
        if given is None:
            given = float(rank) if config is None else config.alpha_of(name)
        self._scales[layer] = float(given), scaled(rank, given, config)
        return self._scales[layer]

    def of_pairs(self, layers: frozenset[str]) -> tuple[float, float]:
        """The alpha and scale of a model's layer that several layers of the file make."""
        applies = {self._scales[name] for name in layers}
        if len(applies) != 1:
            raise refused("layers of different alphas or ranks are one in the model", sorted(layers))
        return applies.pop()

    def of_whole(self, whole: Whole) -> tuple[float, float]:
        if whole.kind == "difference":
            return 1.0, 1.0
        if whole.rank is not None:
            return self.add(whole.layer, whole.rank, whole.alpha)
        if self.alpha is not None or layer_of(f"{whole.layer}{ALPHA}") in self.alphas:
            raise refused("an alpha is given for layers without a rank", [whole.layer], field="lora_alpha")
        _, name = split_name(whole.layer, self.shapes)
        if self.config is None:
            return 1.0, 1.0
        alpha = self.config.alpha_of(name)
        return alpha, scaled(int(self.config.rank_of(name)), alpha, self.config)

    def check_ranks(self) -> None:
        if self._other:
            raise refused(f"of {len(self._other)} layers, the configuration has another rank", self._other)
