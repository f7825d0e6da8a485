"""An adapter that arrives in parts, as trainers send one: replaced layer by layer, and a pair only as a whole.

The server's copy keeps beside the adapter's file what a later part needs to know: which layers came for the version
that is being sent, the alpha that was given with each, and factors whose counterparts have yet to come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file

from ...protocol.adapters import ADAPTER_FILE
from ..pipelines.components import DENOISERS
from ..weights.checkpoint.mapped_files import map_file
from .pairs import ALPHA, parse_factor, refused
from .whole import changed_layer, has_all_factors, is_factor

_NOTES = "parts.json"
_WAITING = "waiting.safetensors"

Tensors = Mapping[str, torch.Tensor]


class Notes(msgspec.Struct, frozen=True):
    """``named`` are the layers that came for ``version``; ``alphas`` those that were given, by layer.

    ``waiting_alphas`` are for layers with waiting factors; the factors in use may be older.
    """

    version: str | None = None
    named: list[str] = []
    alphas: dict[str, float] = {}
    waiting_alphas: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class Parts:
    """``tensors`` are of whole layers, and ``waiting`` of others, each under the name that it was sent with."""

    tensors: Tensors = field(default_factory=dict)
    waiting: Tensors = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)


@dataclass(frozen=True, slots=True)
class Part:
    """One call's tensors. ``version`` is of the weights that they are a part of; without one, they are all of it.

    ``alpha`` is of each of their layers, and ``rank`` the largest. ``complete`` says that no other part comes.
    """

    tensors: Tensors
    version: str | None = None
    alpha: float | None = None
    rank: int | None = None
    complete: bool = False
    begun: bool = False

    @property
    def is_last(self) -> bool:
        """True if no other part can follow."""
        return self.complete or not (self.begun or self.version is not None)


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to, without prefixes, which differ among names of one layer."""
    factor = parse_factor(name)
    layer = factor[0] if factor is not None else changed_layer(name) or name.rpartition(".")[0]
    for prefix in ("base_model.model.", "diffusion_model.", *(f"{denoiser}." for denoiser in DENOISERS)):
        layer = layer.removeprefix(prefix)
    return layer.removeprefix("base_model.model.")


def joined(before: Parts, part: Part) -> tuple[Parts, list[str]]:
    """The parts with one more, and sentences about it. Raises ``InvalidRequest`` for a part that cannot be used.

    Layers that the part has replace those of before. An alpha, a magnitude or a bias is added to a layer whose factors
    an earlier part of the version had. With ``complete`` layers go that no part of its version had.
    """
    goes_on = part.begun or (part.version is not None and part.version == before.notes.version)
    held, named, alphas = (before.waiting, before.notes.named, before.notes.waiting_alphas) if goes_on else ({}, [], {})
    older = _by_layer(before.tensors)
    came = {
        layer: tensors if layer not in named or any(map(_is_factor, tensors)) else {**older[layer], **tensors}
        for layer, tensors in _by_layer({**held, **part.tensors}).items()
    }
    whole = {layer: tensors for layer, tensors in came.items() if _is_whole(tensors)}
    waiting = _flat(tensors for layer, tensors in came.items() if layer not in whole)
    named = sorted({*named, *whole})
    kept = {layer: one for layer, one in older.items() if layer not in whole and (layer in named or not part.complete)}
    layers = kept | whole
    _check(part, waiting, layers, named)
    if part.alpha is not None:
        alphas = alphas | {layer_of(name): part.alpha for name in part.tensors}
    notes = Notes(
        version=part.version,
        named=named,
        alphas={layer: a for layer, a in before.notes.alphas.items() if layer in kept}
        | {layer: a for layer, a in alphas.items() if layer in whole},
        waiting_alphas={layer: a for layer, a in alphas.items() if layer not in whole},
    )
    lost = [] if goes_on else sorted(before.waiting)
    sentences = [f"The counterparts of {', '.join(lost[:3])} never came, so these are left out."] if lost else []
    return Parts(_flat(layers.values()), waiting, notes), sentences


def _check(part: Part, waiting: Tensors, layers: Mapping[str, Tensors], named: Sequence[str]) -> None:
    if waiting and part.is_last:
        raise refused(f"{len(waiting)} factors have no counterpart", sorted(waiting))
    if part.is_last and not layers:
        raise refused("it has no layers")
    _check_rank(part, _flat(layers[layer] for layer in named))


def _flat(layers: Iterable[Tensors]) -> dict[str, torch.Tensor]:
    return {name: tensor for tensors in layers for name, tensor in tensors.items()}


def read_parts(folder: Path) -> Parts:
    """Read the output of :func:`write_parts`."""
    waiting = folder / _WAITING
    return Parts(
        map_file(folder / ADAPTER_FILE), map_file(waiting) if waiting.exists() else {}, read_notes(folder) or Notes()
    )


def read_notes(folder: Path) -> Notes | None:
    """``None`` beside an adapter that did not come in parts."""
    notes = folder / _NOTES
    return msgspec.json.decode(notes.read_bytes(), type=Notes) if notes.exists() else None


def has_whole_layers(folder: Path) -> bool:
    """True if an adapter has a layer yet: of a version that is being sent, all factors may still be waiting."""
    notes = read_notes(folder)
    return notes is None or notes.version is None or bool(map_file(folder / ADAPTER_FILE))


def write_parts(parts: Parts, folder: Path) -> None:
    """Write an adapter's copy, in a folder that is made. Raises ``OSError`` and ``SafetensorError``."""
    folder.mkdir(mode=0o700)
    save_file(_owned(parts.tensors), folder / ADAPTER_FILE)
    if parts.waiting:
        save_file(_owned(parts.waiting), folder / _WAITING)
    (folder / _NOTES).write_bytes(msgspec.json.encode(parts.notes))


def of_module(tensors: Tensors, module: str) -> dict[str, torch.Tensor]:
    """``tensors`` under names that mean ``module``; bare ones are taken for the denoiser's."""
    own = "" if module in DENOISERS else f"{module}."
    return {name if name.startswith(own) else own + name: tensor for name, tensor in tensors.items()}


def _by_layer(tensors: Tensors) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault(layer_of(name), {})[name] = tensor
    return found


def _is_whole(names: Collection[str]) -> bool:
    """True if a layer's tensors have all factors that they need. An alpha alone is not a layer."""
    factors = [factor[1] for name in names if (factor := parse_factor(name)) is not None]
    return (
        factors.count(True) == factors.count(False)
        and has_all_factors(names, with_pair=bool(factors))
        and not all(name.endswith(ALPHA) for name in names)
    )


def _is_factor(name: str) -> bool:
    return parse_factor(name) is not None or is_factor(name)


def _check_rank(part: Part, came: Tensors) -> None:
    """The largest rank must be the one that is given; before the last part it may be smaller."""
    downs = [one for name, one in came.items() if (factor := parse_factor(name)) is not None and not factor[1]]
    largest = max((one.shape[0] for one in downs if one.ndim), default=None)
    if part.rank is None or largest is None or largest == part.rank:
        return
    if largest > part.rank or part.is_last:
        raise refused(f"it has rank {largest}, and not {part.rank}", field="lora_rank")


def _owned(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}
