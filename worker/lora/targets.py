"""Where the layers of a file are in the model, row by row, also of those that diffusers' converters do not apply to.

A converter is asked with pairs whose ``up`` counts the outputs: where they come out says which rows became which layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from ..internals import diffusers as internals
from ..pipelines.components import DENOISERS
from .convert import FAILURES, NotConverted, Traced, convert, traced
from .names import FOREIGN, LayerRef, Shapes, locate, locate_underscored
from .pairs import ALPHA, Pair
from .sd3 import is_sd3, sd3_targets

_WORDS, _LETTERS = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True, slots=True)
class Target:
    """A layer of the model, and the rows of the file's layer that it has; all of them where ``None``."""

    where: LayerRef
    rows: torch.Tensor | None = None


Targets = dict[str, list[Target]]
"""Targets by the file's layer."""

Outs = Mapping[str, int]
"""How many outputs each of the file's layers has."""


def find_targets(outs: Outs, pairs: Mapping[str, Pair], pipeline: DiffusionPipeline, shapes: Shapes) -> Targets:
    """Where layers are; those that nothing is known of are not in it. ``pairs`` are the file's other layers."""
    found: Targets = {layer: [Target(where)] for layer in outs if (where := locate(layer, shapes)) is not None}
    found |= underscored(outs.keys() - found.keys(), shapes)
    ways: list[Callable[[Outs], Targets]] = [
        lambda missing: by_sd3(missing, {**pairs, **outs}, shapes),
        lambda missing: _by_checkpoint(missing, pipeline, shapes),
        lambda missing: _by_converter(missing, pairs, pipeline, shapes),
    ]
    for way in ways:
        if missing := {layer: out for layer, out in outs.items() if layer not in found}:
            found |= way(missing)
    return found


def underscored(layers: Iterable[str], shapes: Shapes) -> Targets:
    return {layer: [Target(where)] for layer, where in locate_underscored(layers, shapes).items()}


def by_sd3(outs: Outs, every: Mapping[str, object], shapes: Shapes) -> Targets:
    """In a file with sd-scripts' names for Stable Diffusion 3, as ``every`` layer of it shows."""
    layers = shapes.get("transformer", {})
    if not any(is_sd3(layer) for layer in every) or "context_embedder" not in layers:
        return {}
    width = layers["context_embedder"][0]
    found = underscored(outs, shapes)
    for layer, out in outs.items():
        targets = [
            Target(where, rows) for name, rows in sd3_targets(layer, out, width) if (where := locate(name, shapes))
        ]
        if targets:
            found[layer] = targets
    return found


def _by_checkpoint(outs: Outs, pipeline: DiffusionPipeline, shapes: Shapes) -> Targets:
    """Ask diffusers' converter of single-file checkpoints, where it takes some layers alone (Wan's does)."""
    denoiser = next((name for name in DENOISERS if name in shapes), None)
    known = internals.SINGLE_FILE_LOADABLE_CLASSES.get(type(pipeline.components.get(denoiser)).__name__, {})
    own = {layer: out for layer, out in outs.items() if layer.startswith(FOREIGN)}
    if not own or "checkpoint_mapping_fn" not in known:
        return {}
    given = {f"{layer.removeprefix(FOREIGN)}.weight": traced(_counted(out), layer) for layer, out in own.items()}
    try:
        result = known["checkpoint_mapping_fn"](given)
    except FAILURES:
        return {}
    found: Targets = {}
    for name, tensor in result.items():
        where = locate(name.removesuffix(".weight"), shapes)
        if where is not None and isinstance(tensor, Traced) and len(tensor.sources) == 1:
            (layer,) = tensor.sources
            found.setdefault(layer, []).append(Target(where, _rows(tensor, own[layer])))
    return found


def _by_converter(outs: Outs, pairs: Mapping[str, Pair], pipeline: DiffusionPipeline, shapes: Shapes) -> Targets:
    """Ask the pipeline's converter of adapters, with the file's other layers too, as some converters need them."""
    style = next((_style(pair) for pair in pairs.values()), None)
    every = {**{layer: pair.up.shape[0] for layer, pair in pairs.items()}, **outs}
    probes = {layer: _probe(layer, out, style) for layer, out in every.items()}
    try:
        converted = convert(probes, pipeline)
    except NotConverted:
        return {}
    found: Targets = {}
    for name, pair in converted.items():
        if len(pair.layers) == 1 and pair.up.shape[1] == 1 and (where := locate(name, shapes)) is not None:
            (layer,) = pair.layers
            found.setdefault(layer, []).append(Target(where, _rows(pair.up, every[layer])))
    return {layer: targets for layer, targets in found.items() if layer in outs}


def _style(pair: Pair) -> tuple[str, str]:
    return _LETTERS if "lora_A" in pair.names[0] else _WORDS


def _probe(layer: str, out: int, style: tuple[str, str] | None) -> Pair:
    down, up = style or (_WORDS if layer.startswith("lora_") else _LETTERS)
    alpha = f"{layer}{ALPHA}" if layer.startswith("lora_") else None
    return Pair(torch.ones(1, 1), _counted(out), 1.0, (f"{layer}.{down}", f"{layer}.{up}"), alpha)


def _counted(out: int) -> torch.Tensor:
    """[out, 1], from 1 on: exact in float32 for any layer that there is, and never nothing."""
    return torch.arange(1, out + 1, dtype=torch.float32)[:, None]


def _rows(tensor: torch.Tensor, out: int) -> torch.Tensor | None:
    rows = tensor.as_subclass(torch.Tensor).flatten().long() - 1
    return None if torch.equal(rows, torch.arange(out)) else rows
