"""An adapter's file: read in whatever format it is, checked against the model, and given in the model's own names."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...protocol.errors import InvalidRequest
from ...protocol.tensor_files import BadTensorFile, read_metadata
from ..weights.sources import map_file
from .alphas import Told, parse_object, read_config, read_header, scaled
from .pairs import Pair, find_pairs, refused
from .places import Shapes, place, split_name, weight_shapes

__all__ = ["AdapterFile", "LowRank", "load_adapter", "read_adapter", "weight_shapes"]

_CONFIG = "adapter_config.json"
_PEFT_FILE = "adapter_model.safetensors"
_KNOWN_FILES = (_PEFT_FILE, "pytorch_lora_weights.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LONGEST_CONFIG = 1 << 20

_FORMATS = (
    (re.compile(r"^(lora_unet|lora_te|lora_transformer)"), "kohya"),
    (re.compile(r"^(diffusion_model\.)?(double|single)_blocks\..*\.processor\."), "xlabs"),
    (re.compile(r"^base_model\.model\."), "peft"),
    (re.compile(r"^diffusion_model\."), "ai-toolkit"),
    (re.compile(r"^(unet|transformer|transformer_2|text_encoder|text_encoder_2)\."), "diffusers"),
    (re.compile(r"\.lora_[AB]\."), "peft"),
    (re.compile(r""), "of no known kind"),
)
"""By what any of a file's names looks like. It is for logs alone."""


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
    the file's tensors, ``format`` its kind in a word."""

    layers: dict[str, dict[str, LowRank]]
    rank: int
    alpha: float
    nbytes: int
    format: str


def load_adapter(path: Path, pipeline: DiffusionPipeline, shapes: Shapes, *, alpha: float | None = None) -> AdapterFile:
    """Read a safetensors file, or a directory with one adapter in it. Raises ``InvalidRequest``."""
    try:
        file = _only_file(path) if path.is_dir() else path
        if not file.is_file():
            raise refused(f"there is no file {file.name[:200]!r}")
        if file.suffix in _PICKLED:
            raise refused(f"{file.name} is a pickled file, which could run code; safetensors files are read")
        if file.suffix != ".safetensors":
            raise refused(f"{file.name[:200]!r} is no .safetensors file")
        config = _read_config(file.parent / _CONFIG) if path.is_dir() or file.name == _PEFT_FILE else None
        tensors = map_file(file)
        with file.open("rb") as stream:
            metadata = read_metadata(stream, os.fstat(stream.fileno()).st_size)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, field="lora_path") from None
    except BadTensorFile as error:
        raise refused(f"{error}") from None
    except OSError as error:
        raise refused(f"{path.name[:200]!r} cannot be read: {error.strerror}") from None
    return read_adapter(tensors, config, pipeline, shapes, alpha=alpha, metadata=metadata)


def _only_file(folder: Path) -> Path:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    for candidates in (
        [name for name in _KNOWN_FILES if name in names],
        [n for n in names if n.endswith(".safetensors")],
    ):
        if len(candidates) > 1:
            raise refused(f"{folder.name} has {len(candidates)} files that could be meant", candidates)
        if candidates:
            return folder / candidates[0]
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        raise refused(
            f"{folder.name} has only pickled files, which could run code; safetensors files are read", pickled
        )
    raise refused(f"{folder.name} has no .safetensors file")


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    if not path.is_file() or path.stat().st_size > _LONGEST_CONFIG:
        raise refused(f"{_CONFIG} is no file, or too large")
    return parse_object(path.read_bytes(), _CONFIG)


def read_adapter(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    pipeline: DiffusionPipeline,
    shapes: Shapes,
    *,
    alpha: float | None = None,
    metadata: Mapping[str, str] | None = None,
) -> AdapterFile:
    """The adapter of these tensors, with ``config`` that lay beside them and the ``metadata`` of their header.

    ``alpha`` is for all layers, whatever the file says. Otherwise a layer's own applies, else the configuration's, else
    the header's, else the rank. Raises ``InvalidRequest``.
    """
    if alpha is not None and not 0 < alpha < float("inf"):
        raise refused(f"an alpha of {alpha} is no positive number", field="lora_alpha")
    told = None if config is None else read_config(config)
    by_component = read_header(metadata or {})
    pairs = find_pairs(tensors)
    scales: dict[str, tuple[float, float]] = {}
    other: list[str] = []
    for name, pair in pairs.items():
        component, layer = split_name(name, shapes)
        said = told or by_component.get(component)
        if said is not None and said.rank_of(layer) != pair.rank:
            other.append(f"{layer}: {said.rank_of(layer):g}, not {pair.rank}")
        scales[name] = _scale(layer, pair, said, alpha)
    if other:
        raise refused(f"of {len(other)} layers, another rank is told than they have", other)
    layers: dict[str, dict[str, LowRank]] = {}
    for (component, layer), found in place(pairs, pipeline, shapes).items():
        applies = {scales[name] for name in found.layers}
        if len(applies) != 1:
            raise refused("layers of different alphas or ranks are one in the model", sorted(found.layers))
        layers.setdefault(component, {})[layer] = LowRank(found.down, found.up, *applies.pop())
    every = [pair for named in layers.values() for pair in named.values()]
    return AdapterFile(
        layers=layers,
        rank=max(pair.rank for pair in every),
        alpha=Counter(pair.alpha for pair in every).most_common(1)[0][0],
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        format=_format(tensors),
    )


def _scale(layer: str, pair: Pair, told: Told | None, given: float | None) -> tuple[float, float]:
    """The alpha that applies to a pair, and the scale that follows."""
    alpha = given if given is not None else pair.alpha
    if alpha is None:
        alpha = float(pair.rank) if told is None else told.alpha_of(layer)
    return float(alpha), scaled(pair.rank, alpha, told)


def _format(names: Iterable[str]) -> str:
    return next(word for pattern, word in _FORMATS if any(pattern.search(name) for name in names))
