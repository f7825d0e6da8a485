"""The pairs of low-rank factors of an adapter's file, under the file's own names. Nothing in a file is left aside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch

from ...protocol.errors import InvalidRequest

ADAPTER_NAME = r"(?:\.(?!(?:weight|bias)$)[\w-]+)?"
"""The adapter's name, mostly ``default``, which names in peft's modules contain, and names in its files do not."""

_FACTOR = re.compile(
    rf"(?P<layer>.+?)\.(?:lora_(?P<letter>[AB]){ADAPTER_NAME}(?:\.weight)?"
    r"|(?:lora_|lora\.|lora_linear_layer\.)?(?P<word>down|up)(?:\.default)?\.weight)"
)

ALPHA = ".alpha"

_NOT_LOW_RANK = {
    "embeddings": re.compile(r"lora_embedding_"),
    "Tucker decompositions": re.compile(r"lora_mid"),
    "differences of modulations (diff_m)": re.compile(r"\.diff_m$"),
    "biases of the factors that narrow": re.compile(rf"\.(lora_A|lora_down|down){ADAPTER_NAME}\.bias$"),
}
"""Changes that cannot be applied, by a pattern of their tensors' names."""

_LONG_NUMBER = re.compile(r"\d{5}")
"""No model has so many blocks, and there are converters that count up to the number."""

_SHOWN = 3
_SHOWN_CHARACTERS = 120


def refused(reason: str, names: Iterable[str] = (), *, field: str = "lora_path") -> InvalidRequest:
    """The error for the client that sent the adapter, with the first of the ``names`` concerned."""
    shown = ", ".join(name[:_SHOWN_CHARACTERS] for name in islice(names, _SHOWN))
    return InvalidRequest(f"The adapter cannot be used: {reason}{f' ({shown})' if shown else ''}.", field=field)


@dataclass(slots=True)
class LeftOut:
    """Layers of a file that the model lacks: refused if ``strict``, else left out and listed in ``names``."""

    strict: bool = True
    names: list[str] = field(default_factory=list)

    def out(self, reason: str, names: Iterable[str]) -> None:
        """Leave ``names`` out. Raises ``InvalidRequest``."""
        if self.strict:
            raise refused(reason, names)
        self.names += names


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one layer, in float32 and in memory of their own; ``alpha`` as the file has it for this layer.

    ``names`` are those of the two tensors, down and up, and ``alpha_name`` that of the third, where there is one.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None
    names: tuple[str, str]
    alpha_name: str | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(slots=True)
class _Found:
    factors: dict[str, dict[bool, str]] = field(default_factory=dict)  # by layer, the names of down and up
    alphas: dict[str, str] = field(default_factory=dict)


def parse_factor(name: str) -> tuple[str, bool] | None:
    """The layer that a tensor of this name is a factor of, and whether it is the one that widens (up)."""
    if (match := _FACTOR.fullmatch(name)) is None:
        return None
    return match["layer"], match["letter"] == "B" or match["word"] == "up"


def find_pairs(tensors: Mapping[str, torch.Tensor], left: LeftOut, *, required: bool = True) -> dict[str, Pair]:
    """All pairs by the name of their layer. Raises ``InvalidRequest`` where there is anything else, or half a pair."""
    found = _sort(tensors, left)
    if not found.factors and required:
        raise refused("it has no pairs of low-rank factors", tensors)
    halves = [name for names in found.factors.values() if len(names) == 1 for name in names.values()]
    if halves:
        raise refused(f"{len(halves)} factors have no counterpart", halves)
    if alone := [name for layer, name in found.alphas.items() if layer not in found.factors]:
        raise refused(f"{len(alone)} alphas are of no layer", alone)
    pairs = {
        layer: _pair(tensors, names[False], names[True], found.alphas.get(layer))
        for layer, names in found.factors.items()
    }
    if unfit := [layer for layer, pair in pairs.items() if not _fit(pair)]:
        raise refused(f"{len(unfit)} pairs do not fit each other", (_shapes(layer, pairs[layer]) for layer in unfit))
    check_finite((layer, (pair.down, pair.up)) for layer, pair in pairs.items())
    return pairs


def _sort(tensors: Mapping[str, torch.Tensor], left: LeftOut) -> _Found:
    for kind, pattern in _NOT_LOW_RANK.items():
        if others := [name for name in tensors if pattern.search(name)]:
            left.out(f"{len(others)} of its tensors are of {kind}, which cannot be applied", others)
            tensors = {name: tensor for name, tensor in tensors.items() if not pattern.search(name)}
    found, strange = _Found(), list[str]()
    for name, tensor in tensors.items():
        if (factor := parse_factor(name)) is not None and tensor.is_floating_point() and not _LONG_NUMBER.search(name):
            layer, is_up = factor
            names = found.factors.setdefault(layer, {})
            if is_up in names:
                raise refused("it has a factor twice", (names[is_up], name))
            names[is_up] = name
        elif name.endswith(ALPHA):
            found.alphas[name.removesuffix(ALPHA)] = name
        else:
            strange.append(name)
    if strange:
        raise refused(f"{len(strange)} of its tensors are not low-rank factors", strange)
    return found


def _pair(tensors: Mapping[str, torch.Tensor], down: str, up: str, alpha: str | None) -> Pair:
    own = None if alpha is None else one_alpha(alpha, tensors[alpha])
    full_names = tuple(name if name.endswith(".weight") else f"{name}.weight" for name in (down, up))
    return Pair(float32(tensors[down]), float32(tensors[up]), own, (full_names[0], full_names[1]), alpha)


def float32(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, as a file's memory can be read-only, and converters multiply in place."""
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()


def one_alpha(name: str, tensor: torch.Tensor) -> float:
    if tensor.numel() != 1 or tensor.is_complex() or not 0 < float(tensor) < float("inf"):
        raise refused("an alpha is not a positive number", [name])
    return float(tensor)


def check_finite(layers: Iterable[tuple[str, Iterable[torch.Tensor]]]) -> None:
    """Raises ``InvalidRequest`` with the names of layers whose tensors have infinite values or NaN."""
    bad = [name for name, tensors in layers if not all(torch.isfinite(tensor).all() for tensor in tensors)]
    if bad:
        raise refused(f"{len(bad)} layers have infinite values or NaN", bad)


def _fit(pair: Pair) -> bool:
    return min(pair.down.ndim, pair.up.ndim) >= 2 and pair.down.shape[0] == pair.up.shape[1] and pair.down.shape[0] > 0


def _shapes(layer: str, pair: Pair) -> str:
    return f"{layer}: {list(pair.up.shape)} and {list(pair.down.shape)}"
