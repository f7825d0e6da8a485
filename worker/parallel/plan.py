"""How a module's parameters are divided among ranks: a plan in diffusers' vocabulary, resolved for one module.

===========================  ==========================================================================
``"colwise"``                output features (weight dimension 0) are divided; an Embedding's columns
``"colwise_gather_output"``  the same, and every rank gets all of the output (transformers' word)
``"rowwise"``                input features (weight dimension 1) are divided and the products added up; an
                             Embedding's rows
``PackedColwiseParallel``    ``colwise``, each block of a fused weight for itself
``PackedRowwiseParallel``    ``rowwise``, each block of a concatenated input for itself
``"across_heads"``           an RMS norm over all heads: its weight is divided, its mean square is of all ranks
``"split_output"``           no weights; of the tensors that it returns each rank takes its part of the last dimension
===========================  ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import nn

from ..internals import diffusers as internals

Style: TypeAlias = Any
"""One of diffusers' names, or an instance of ``PackedColwiseParallel`` or ``PackedRowwiseParallel``."""

COLWISE, GATHERED = "colwise", "colwise_gather_output"
ACROSS_HEADS, SPLIT_OUTPUT = "across_heads", "split_output"


class CannotDivide(Exception):
    """A module is not what the plan for its class was written for; a sentence says where."""


@dataclass(frozen=True)
class Family:
    """What tensor parallelism and fusing need to know of a model class. Patterns are dotted paths, ``*`` one name.

    ``heads`` names the configuration's head counts, which the degree must divide. ``parts`` are the paths of what is
    whole on every rank where the degree does not divide it, each with the head counts that it alone is divided by.
    ``divided`` names attributes that hold a count or size of heads, for processors that compute with them. ``fused``
    names layers of one parent with the same input, whose weights can be one. ``needs`` are values of the configuration
    that the plan was written for.
    """

    plan: Mapping[str, Style]
    heads: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    divided: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shard:
    """A parameter's dimension ``dim`` is divided; each of ``blocks`` (sizes that add up to it) for itself."""

    dim: int
    blocks: tuple[int, ...]


def matching(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """The sub-modules, with their paths, that ``pattern`` names."""
    expression = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
    for path, part in module.named_modules():
        if expression.fullmatch(path):
            yield path, part


def resolve(module: nn.Module, family: Family) -> dict[str, tuple[nn.Module, Style]]:
    """The sub-modules that the plan names, by path, with their styles."""
    found: dict[str, tuple[nn.Module, Style]] = {}
    for pattern, style in family.plan.items():
        for path, part in matching(module, pattern):
            found[path] = (part, style)
    return found


def shards(module: nn.Module, family: Family) -> dict[str, Shard]:
    """Parameter name to how it is divided; what is not named is whole on every rank."""
    found: dict[str, Shard] = {}
    for path, (part, style) in resolve(module, family).items():
        for name, shard in _shards_of(part, style).items():
            found[f"{path}.{name}"] = shard
    return found


def _shards_of(part: nn.Module, style: Style) -> dict[str, Shard]:
    weight = getattr(part, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return {}
    shape = tuple(weight.shape)
    if isinstance(part, nn.Embedding):
        dim = 1 if style == COLWISE else 0
        return {"weight": Shard(dim, (shape[dim],))}
    if style == ACROSS_HEADS:
        return {"weight": Shard(0, shape)}
    if style in (COLWISE, GATHERED) or isinstance(style, internals.PackedColwiseParallel):
        shard = Shard(0, _blocks(part, style, "_tp_packed_col_blocks", shape[0]))
        return {"weight": shard} | ({"bias": shard} if getattr(part, "bias", None) is not None else {})
    return {"weight": Shard(1, _blocks(part, style, "_tp_packed_row_blocks", shape[1]))}


def _blocks(part: nn.Module, style: Style, attribute: str, total: int) -> tuple[int, ...]:
    """The sizes of a packed weight's blocks: the style's own proportions, else what the class says of itself."""
    if isinstance(style, str):
        return (total,)
    parts: Any = style.blocks if style.blocks is not None else getattr(part, attribute)
    unit, rest = divmod(total, sum(parts))
    if rest:
        raise CannotDivide(f"a {type(part).__name__} with {total} features has no blocks of the sizes {parts}")
    return tuple(unit * block for block in parts)


def degrees(module: nn.Module, family: Family, most: int = 64) -> list[int]:
    """The tensor-parallel degrees, up to ``most``, that divide all that must be divided.

    Only 1 where the configuration is not the one that the plan was written for.
    """
    return [degree for degree in range(1, most + 1) if degree == 1 or undividable(module, family, degree) is None]


def undividable(module: nn.Module, family: Family, degree: int) -> str | None:
    """What keeps the module from being divided, with its number; ``None`` where nothing does."""
    for name, value in family.needs.items():
        if (own := setting(module, name)) != value:
            return f"its {name} is {own}, and there is a plan for {value} alone"
    required = _without(family, family.parts)
    return _not_divided(module, family.heads, shards(module, required), degree)


def fit(module: nn.Module, family: Family, degree: int) -> tuple[Family, dict[str, str]]:
    """The family without the parts that ``degree`` does not divide; their paths, each with the reason."""
    whole: dict[str, str] = {}
    for part, heads in family.parts.items():
        own = _without(family, [path for path in family.plan if not _is_below(path, part)])
        reason = _not_divided(module, heads, shards(module, own), degree)
        if reason is not None:
            whole[part] = reason
    return _without(family, whole), whole


def _not_divided(module: nn.Module, heads: Iterable[str], divided: Mapping[str, Shard], degree: int) -> str | None:
    for name in heads:
        if int(setting(module, name)) % degree:
            return f"its {name} is {setting(module, name)}"
    for path, shard in divided.items():
        for block in shard.blocks:
            if block % degree:
                return f"dimension {shard.dim} of {path} is {block}"
    return None


def _without(family: Family, paths: Iterable[str]) -> Family:
    """The family whose plan says nothing of what is at or below ``paths``."""
    paths = list(paths)

    def stays(pattern: str) -> bool:
        return not any(_is_below(pattern, path) for path in paths)

    return replace(
        family,
        plan={pattern: style for pattern, style in family.plan.items() if stays(pattern)},
        divided={pattern: names for pattern, names in family.divided.items() if stays(pattern)},
    )


def _is_below(pattern: str, path: str) -> bool:
    return pattern == path or pattern.startswith(f"{path}.")


def setting(module: nn.Module, name: str) -> Any:
    """A value of the module's configuration, diffusers' or (of its language model) transformers'."""
    config: Any = module.config
    return config[name] if isinstance(config, Mapping) else getattr(config.get_text_config(), name)
