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
from .alphas import Told, parse_object, read_config, read_header, scaled
from .convert import Converted
from .matching import ABSENT, fault_of, place
from .names import Shapes, split_name, weight_shapes
from .pairs import ALPHA, LeftOut, Pair, find_pairs, refused
from .parts import layer_of, read_notes
from .targets import find_targets
from .whole import Whole, decomposed, of_pair, take_magnitudes, take_whole

__all__ = ["AdapterFile", "LowRank", "load_adapter", "read_adapter", "weight_shapes"]


_COPIED_WITHIN = 1e-3
"""By how much, in the norm, a copy of a layer may differ: those of a file are rounded apart."""


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
class WholeChange:
    """What an adapter changes in one weight or bias of the model, which can only be merged: ``scale`` times ``whole``.

    ``rows`` are those of the file's layer that this one has; all of them where ``None``.
    """

    component: str
    layer: str
    whole: Whole
    scale: float
    rows: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """The pairs by component and layer, and other changes. ``rank`` is the largest, ``alpha`` that of most layers,
    ``nbytes`` the size of all factors. ``left`` names what has no place in the model and is left out."""

    layers: dict[str, dict[str, LowRank]]
    rank: int
    alpha: float
    nbytes: int
    changes: list[WholeChange] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

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
    """The adapter of these tensors, with ``config`` that lay beside them and the ``metadata`` of their header.

    ``alpha`` is for all layers, and ``alphas`` are for some, whatever the file says. Otherwise a layer's own applies,
    else the configuration's, else the header's, else the rank. What the model has no place for is refused
    when ``strict``, else left out. Raises ``InvalidRequest``.
    """
    if alpha is not None and not 0 < alpha < float("inf"):
        raise refused(f"an alpha of {alpha} is no positive number", field="lora_alpha")
    configured = None if config is None else read_config(config)
    scaling = _Scaling(configured, read_header(metadata or {}), alpha, alphas, shapes)
    pairs, wholes = _read(tensors, left := LeftOut(strict))
    scaling.check_kinds(wholes)
    placed = place(pairs, pipeline, shapes, left)  # before patterns meet names, so that these are a model's
    changes = _changes(wholes, pairs, pipeline, shapes, left)
    for name in dict.fromkeys(name for _, pair in placed for name in pair.layers):
        scaling.add(name, pairs[name].rank, pairs[name].alpha)
    layers = _layers(placed, scaling)
    scaled = [(where, target, whole, scaling.of_whole(whole)) for where, target, whole in changes]
    scaling.check_ranks()
    found = [WholeChange(*where, whole, scale, rows) for where, rows, whole, (_, scale) in scaled]
    every = [pair for named in layers.values() for pair in named.values()]
    if not every and not found:
        raise refused("nothing of it has a place in the model", left.names)
    ranks = [(pair.alpha, pair.rank) for pair in every]
    ranks += [(said, whole.rank) for _, _, whole, (said, _) in scaled if whole.rank is not None]
    nbytes = sum(pair.down.nbytes + pair.up.nbytes for pair in every) + sum(one.whole.nbytes for one in found)
    usual = Counter(one for one, _ in ranks).most_common(1)[0][0] if ranks else 0.0
    rank = max((rank for _, rank in ranks), default=0)
    return AdapterFile(layers, rank, usual, nbytes, found, sorted(set(left.names)))


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
) -> list[tuple[tuple[str, str], torch.Tensor | None, Whole]]:
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


def _layers(placed: list[tuple[tuple[str, str], Converted]], scaling: _Scaling) -> dict[str, dict[str, LowRank]]:
    """The pairs by place. A copy of a layer under another name, as of a fused one and its parts, is the same once."""
    layers: dict[str, dict[str, LowRank]] = {}
    names: dict[tuple[str, str], frozenset[str]] = {}
    for where, found in placed:
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
    """By what each layer's change is multiplied: what the request says, the layer, the configuration or the header."""

    told: Told | None
    by_component: Mapping[str, Told]
    alpha: float | None
    alphas: Mapping[str, float]
    shapes: Shapes
    _scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    _other: list[str] = field(default_factory=list)

    def check_kinds(self, wholes: list[Whole]) -> None:
        """Raises ``InvalidRequest`` where the configuration is of something else than the file."""
        kinds = {one.kind for one in wholes}
        for told in (self.told, *self.by_component.values()):
            if told is not None and told.kind is not None and told.kind not in kinds:
                raise refused(f"{told.where} is of {told.kind}, and the file has none")

    def add(self, layer: str, rank: int, own: float | None) -> tuple[float, float]:
        """The alpha that applies to a layer of the file, and the scale that follows."""
        component, name = split_name(layer, self.shapes)
        told = self.told or self.by_component.get(component)
        if told is not None and told.rank_of(name) != rank:
            self._other.append(f"{name}: {told.rank_of(name):g}, not {rank}")
        given = self.alpha if self.alpha is not None else self.alphas.get(layer_of(f"{layer}{ALPHA}"), own)
        if given is None:
            given = float(rank) if told is None else told.alpha_of(name)
        self._scales[layer] = float(given), scaled(rank, given, told)
        return self._scales[layer]

    def of_pairs(self, layers: frozenset[str]) -> tuple[float, float]:
        """Of what is made of several layers of the file."""
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
        if self.told is None:
            return 1.0, 1.0
        alpha = self.told.alpha_of(name)
        return alpha, scaled(int(self.told.rank_of(name)), alpha, self.told)

    def check_ranks(self) -> None:
        if self._other:
            raise refused(f"of {len(self._other)} layers, another rank is told than they have", self._other)
