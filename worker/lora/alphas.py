"""An adapter's alphas as written beside its tensors: in ``adapter_config.json``, or in the file's header.

Both are peft's ``LoraConfig`` as a dictionary; in the header, where diffusers writes it, every component has its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .pairs import refused

_HEADER = "lora_adapter_metadata"
"""Where diffusers writes it (``LORA_ADAPTER_METADATA_KEY``)."""

_NOT_APPLIED = (
    "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices",
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Options under which an adapter is more than what its tensors say."""

_KINDS: dict[str, str | None] = {"LORA": None, "LOKR": "LoKr", "LOHA": "LoHa"}
"""The kinds that can be applied, by peft's type."""

_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the weights beside which the adapter was trained."""

_LONGEST_PATTERN = 500

_SLOW_PATTERN = re.compile(r"[()]|([*+{?].*){3}")
"""Groups, and more repetitions than two: a match could take for ever."""

_MOST_PATTERNS = 64
"""Patterns that are more than a name; peft writes one for each kind of layers."""

_LARGEST = 1e6
"""The limit of any alpha or rank."""

_NAME = re.compile(r"[\w.]+")

Patterns = list[tuple[re.Pattern[str], float]]


@dataclass(frozen=True, slots=True)
class AlphaConfig:
    """``alpha`` and ``rank`` of the layers whose names match no pattern; ``where`` it is written."""

    where: str
    alpha: float
    rank: int
    alphas: Patterns
    ranks: Patterns
    rslora: bool
    kind: str | None = None
    """The kind of changes that the file must have: LoKr, LoHa or DoRA; ``None`` of pairs."""

    def alpha_of(self, layer: str) -> float:
        return _first(self.alphas, layer, self.alpha)

    def rank_of(self, layer: str) -> float:
        return _first(self.ranks, layer, self.rank)


def scaled(rank: int, alpha: float, config: AlphaConfig | None) -> float:
    """The factor of a pair's product: alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA
    (https://arxiv.org/abs/2312.03732)."""
    return alpha / (math.sqrt(rank) if config is not None and config.rslora else rank)


def read_config(config: Mapping[str, Any], where: str = "adapter_config.json") -> AlphaConfig:
    """Raises ``InvalidRequest`` if peft does not write such a configuration, or if it asks for more than LoRA."""
    kind = str(config.get("peft_type", "LORA"))
    if kind not in _KINDS:
        raise refused(f"{where} is of {kind[:50]!r}, not of {', '.join(_KINDS)}")
    if asked := [name for name in _NOT_APPLIED if config.get(name)]:
        raise refused(f"{where} asks for what cannot be applied", asked)
    if config.get("bias", "none") != "none":
        raise refused(f"{where} asks for what cannot be applied", [f"bias={str(config['bias'])[:50]}"])
    first = config.get("init_lora_weights")
    if isinstance(first, str) and first.startswith(_OTHER_BASE):
        raise refused(f"{where} says init_lora_weights={first[:50]!r}, so that it fits other weights than the model's")
    rank, rslora = config.get("r"), config.get("use_rslora") or False
    if type(rank) is not int or not 0 < rank <= _LARGEST or type(rslora) is not bool:
        raise refused(f"{where} does not say r as a positive integer, or use_rslora as a boolean")
    return AlphaConfig(
        where=where,
        alpha=_positive(config.get(name := "lora_alpha" if kind == "LORA" else "alpha"), name, where),
        rank=rank,
        alphas=_patterns(config.get("alpha_pattern"), "alpha_pattern", where),
        ranks=_patterns(config.get("rank_pattern"), "rank_pattern", where),
        rslora=rslora,
        kind="DoRA" if config.get("use_dora") else _KINDS[kind],
    )


def read_header(metadata: Mapping[str, str]) -> dict[str, AlphaConfig]:
    """The configurations that diffusers wrote into a file's header, by component. Raises ``InvalidRequest``."""
    if _HEADER not in metadata:
        return {}
    where = f"{_HEADER} in the file's header"
    packed = parse_object(metadata[_HEADER], where)
    components: dict[str, dict[str, Any]] = {}
    for name, value in packed.items():
        component, _, option = name.partition(".")
        components.setdefault(component, {})[option] = value
    return {component: read_config(config, where) for component, config in components.items()}


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises ``InvalidRequest``."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise refused(f"{where} is not JSON") from None
    if not isinstance(found, dict):
        raise refused(f"{where} is not a JSON object")
    return found


def _positive(value: object, name: str, where: str) -> float:
    if type(value) not in (int, float) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise refused(f"{where} does not say {name} as a positive number, of at most a million")
    return float(value)


def _patterns(given: object, name: str, where: str) -> Patterns:
    """peft's patterns: of a layer's name from the left, or from any dot on, to its end."""
    if given is None:
        return []
    if not isinstance(given, dict):
        raise refused(f"{where} does not say {name} as an object")
    if sum(not _NAME.fullmatch(key) for key in given) > _MOST_PATTERNS:
        raise refused(f"{where} has more than {_MOST_PATTERNS} patterns in its {name} other than names")
    try:
        return [
            (re.compile(rf"(.*\.)?({_quick(key)})$"), _positive(value, f"{name} of {key[:100]}", where))
            for key, value in given.items()
        ]
    except re.error:
        raise refused(f"{where} has something else than patterns in its {name}") from None


def _quick(pattern: str) -> str:
    if len(pattern) > _LONGEST_PATTERN or _SLOW_PATTERN.search(pattern):
        raise re.error("too long, or too slow")
    return pattern


def _first(patterns: Patterns, layer: str, otherwise: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(layer)), otherwise)
