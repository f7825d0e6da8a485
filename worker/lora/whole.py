"""Changes of whole weights other than pairs of factors: differences, LoKr, LoHa and DoRA.

Formulas: LoKr and LoHa are LyCORIS' (https://arxiv.org/abs/2309.14859) as peft computes them
(``peft.tuners.lokr.layer.LoKrLayer.get_delta_weight``, ``peft.tuners.loha.layer.LoHaLayer.get_delta_weight``); DoRA
(https://arxiv.org/abs/2402.09353) as ``peft.tuners.lora.layer.Linear.merge`` has it. ``diff`` and ``diff_b`` are added
as they are, as ComfyUI does (``comfy/weight_adapter/lora.py``, ``comfy/lora.py``), and peft's ``lora_B.bias`` times
alpha / rank. Where LyCORIS has neither factor of a LoKr decomposed, it applies no alpha, as there is no rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .pairs import ADAPTER_NAME, ALPHA, Pair, check_finite, float32, one_alpha, refused

Kind = Literal["difference", "bias", "LoKr", "LoHa", "DoRA"]
Parameter = Literal["weight", "bias"]

_NAMED = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<difference>diff|diff_b|w_norm|b_norm)"
    rf"|lokr_(?P<LoKr>w[12](?:_[ab])?|t2){ADAPTER_NAME}"
    rf"|hada_(?P<LoHa>w[12]_[ab]|t[12]){ADAPTER_NAME}"
    rf"|(?P<DoRA>dora_scale|lora_magnitude_vector){ADAPTER_NAME}(?:\.weight)?"
    rf"|(?:lora_B|lora_up|up){ADAPTER_NAME}\.(?P<bias>bias))"
)
_BIASES = ("diff_b", "b_norm", "bias")
_KINDS: tuple[Kind, ...] = ("difference", "bias", "LoKr", "LoHa", "DoRA")

Factors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Whole:
    """A change of one weight or bias under the file's own name, in float32.

    ``rank`` is what alpha is divided by; without one the change is applied as it is, unless a configuration says more.
    """

    layer: str
    parameter: Parameter
    kind: Kind
    factors: Factors
    alpha: float | None = None
    rank: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The change's shape; that of a convolution may have two dimensions."""
        if self.kind == "DoRA":
            return (self.factors["up"].shape[0], *self.factors["down"].shape[1:])
        meta = {name: factor.to("meta") for name, factor in self.factors.items()}
        return tuple(_ADDED[self.kind](meta).shape)

    def added(self, factors: Factors) -> torch.Tensor:
        """The change at strength and scale 1, from its ``factors`` on any device.

        Not for DoRA, whose change depends on the weight.
        """
        return _ADDED[self.kind](factors)

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factor in self.factors.values())


def changed_layer(name: str) -> str | None:
    """The layer whose whole weight or bias a tensor of this name changes, if it does."""
    return None if (match := _NAMED.fullmatch(name)) is None else match["layer"]


def is_factor(name: str) -> bool:
    """True if a tensor of this name is a factor of LoKr or LoHa."""
    match = _NAMED.fullmatch(name)
    return match is not None and bool(match["LoKr"] or match["LoHa"])


def has_all_factors(names: Iterable[str], *, with_pair: bool) -> bool:
    """True if nothing is missing that the changes of a layer by these names need; ``with_pair`` it has one."""
    found: dict[Kind, set[str]] = {}
    for match in filter(None, map(_NAMED.fullmatch, names)):
        kind = next(kind for kind in _KINDS if match[kind])
        found.setdefault(kind, set()).add(match[kind])
    return (
        ("LoKr" not in found or _is_lokr(found["LoKr"]))
        and ("LoHa" not in found or _is_loha(found["LoHa"]))
        and (with_pair or found.keys().isdisjoint(("DoRA", "bias")))
    )


def take_whole(tensors: Mapping[str, torch.Tensor]) -> tuple[list[Whole], dict[str, torch.Tensor]]:
    """The changes of whole weights, but for DoRA, whose pairs are read first; and the other tensors.

    Raises ``InvalidRequest`` for those that are not whole.
    """
    rest, found = dict(tensors), dict[tuple[str, Kind, Parameter], dict[str, torch.Tensor]]()
    for name, tensor in tensors.items():
        if (match := _NAMED.fullmatch(name)) is None or not tensor.is_floating_point():
            continue
        kind = next(kind for kind in _KINDS if match[kind])
        if kind == "DoRA":
            continue
        part = match[kind]
        parameter: Parameter = "bias" if part in _BIASES else "weight"
        factors = found.setdefault((match["layer"], kind, parameter), {})
        part = "tensor" if kind in ("difference", "bias") else part
        if part in factors:
            raise refused("it has a change twice", [name])
        factors[part] = float32(rest.pop(name))
    alphas = {layer: rest.pop(f"{layer}{ALPHA}", None) for layer, kind, _ in found if kind in ("LoKr", "LoHa")}
    wholes = [_whole(*key, factors, alphas.get(key[0])) for key, factors in found.items()]
    check_finite((f"{one.layer} ({one.kind})", one.factors.values()) for one in wholes)
    return wholes, rest


def take_magnitudes(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """DoRA's magnitudes by layer, one for each output, and the other tensors. Raises ``InvalidRequest``."""
    rest, found = dict(tensors), dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        if (match := _NAMED.fullmatch(name)) is None or not match["DoRA"]:
            continue
        vector = match["DoRA"] == "lora_magnitude_vector"
        if tensor.ndim == 0 or not tensor.is_floating_point() or not (vector or tensor.numel() == tensor.shape[0]):
            raise refused("a magnitude of DoRA is not of outputs, as peft has it", [name])
        check_finite([(name, [tensor])])
        found[match["layer"]] = float32(rest.pop(name)).flatten()
    return found, rest


def decomposed(layer: str, pair: Pair, magnitude: torch.Tensor) -> Whole:
    """DoRA. Raises ``InvalidRequest`` where the magnitudes are not those of the pair's outputs."""
    if len(magnitude) != pair.up.shape[0]:
        raise refused(f"a layer has {pair.up.shape[0]} outputs and {len(magnitude)} magnitudes", [layer])
    factors = {"down": pair.down, "up": pair.up, "magnitude": magnitude}
    return Whole(layer, "weight", "DoRA", factors, pair.alpha, pair.rank)


def of_pair(bias: Whole, pair: Pair) -> Whole:
    """peft's bias of the factor that widens, which is multiplied like the pair."""
    return replace(bias, alpha=pair.alpha, rank=pair.rank)


def _whole(
    layer: str, kind: Kind, parameter: Parameter, factors: dict[str, torch.Tensor], alpha: torch.Tensor | None
) -> Whole:
    given = None if alpha is None else one_alpha(f"{layer}{ALPHA}", alpha)
    if kind in ("difference", "bias"):
        if factors["tensor"].ndim == 0:
            raise refused("a difference has no shape", [layer])
        return Whole(layer, parameter, kind, factors)
    names = set(factors)
    rank = _lokr_rank(factors) if kind == "LoKr" else _loha_rank(factors)
    try:
        if (kind == "LoKr" and not _is_lokr(names)) or (kind == "LoHa" and not _is_loha(names)):
            raise refused(
                f"a layer has not all factors of {kind}, or too many", [f"{layer}: {', '.join(sorted(names))}"]
            )
        whole = Whole(layer, parameter, kind, factors, given, rank)
        _ = whole.shape
    except (RuntimeError, IndexError):
        shapes = ", ".join(f"{name} {list(factor.shape)}" for name, factor in sorted(factors.items()))
        raise refused(f"the factors of a {kind} do not fit each other", [f"{layer}: {shapes}"]) from None
    return whole


def _is_lokr(names: set[str]) -> bool:
    first = names & {"w1", "w1_a", "w1_b"}
    second = names - first
    return first in ({"w1"}, {"w1_a", "w1_b"}) and second in ({"w2"}, {"w2_a", "w2_b"}, {"t2", "w2_a", "w2_b"})


def _is_loha(names: set[str]) -> bool:
    return names - {"t1", "t2"} == {"w1_a", "w1_b", "w2_a", "w2_b"} and len(names & {"t1", "t2"}) != 1


def _lokr_rank(factors: Factors) -> int | None:
    decomposed_ones = [factors[name] for name in ("w1_b", "w2_b") if name in factors]
    return decomposed_ones[0].shape[0] if decomposed_ones else None


def _loha_rank(factors: Factors) -> int | None:
    return factors["w1_b"].shape[0] if "w1_b" in factors else None


def _tucker(core: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ijkl,ip,jr->prkl", core, first, second)


def _lokr_factors(f: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    w1 = f["w1"] if "w1" in f else f["w1_a"] @ f["w1_b"]
    if "w2" in f:
        return w1, f["w2"]
    return w1, _tucker(f["t2"], f["w2_a"], f["w2_b"]) if "t2" in f else f["w2_a"] @ f["w2_b"]


def _lokr(f: Factors) -> torch.Tensor:
    w1, w2 = _lokr_factors(f)
    return torch.kron(w1.view(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())


def _loha(f: Factors) -> torch.Tensor:
    if "t1" in f:
        return _tucker(f["t1"], f["w1_a"], f["w1_b"]) * _tucker(f["t2"], f["w2_a"], f["w2_b"])
    return (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])


_ADDED: dict[Kind, Callable[[Factors], torch.Tensor]] = {
    "difference": lambda f: f["tensor"],
    "bias": lambda f: f["tensor"],
    "LoKr": _lokr,
    "LoHa": _loha,
}
