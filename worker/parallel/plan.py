"""Tensor-parallel plans, in diffusers' vocabulary: how a module's parameters are divided among ranks.

===========================  ==========================================================================
``"colwise"``                output features (weight dimension 0) are divided; an Embedding's columns
``"colwise_gather_output"``  the same, and an all-gather joins the output (transformers' name)
``"rowwise"``                input features (weight dimension 1) are divided and the products added up; an
                             Embedding's rows
``PackedColwiseParallel``    ``colwise``, applied to each block of a fused weight
``PackedRowwiseParallel``    ``rowwise``, applied to each block of a concatenated input
``"across_heads"``           an RMS norm over all heads: its weight is divided, its mean square covers all ranks
``"split_output"``           no weights; each rank takes its part of the last dimension of the returned tensors
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
    """A module differs from what the plan for its class expects; the message says where."""


@dataclass(frozen=True)
class Family:
    """A model class's knowledge about tensor parallelism and fusing. Patterns are dotted paths; ``*`` is one name.

    ``heads`` names the configuration's head counts, which the degree must divide. ``parts`` are the paths of modules
    that stay whole on every rank if the degree does not divide them, each with its own head counts. ``divided`` names
    attributes with a count or size of heads, which attention processors compute with. ``fused`` names layers of one
    parent with the same input, whose weights can be fused. ``needs`` are the configuration's values that the plan
    requires.
    """

    plan: Mapping[str, Style]
    heads: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    divided: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shard:
    """A parameter is divided along ``dim``: each of its ``blocks`` (sizes that add up to ``dim``'s) separately."""

    dim: int
    blocks: tuple[int, ...]


def matching(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    """The submodules that match ``pattern``, with their paths."""
    expression = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
    for path, part in module.named_modules():
        if expression.fullmatch(path):
            yield path, part


def resolve(module: nn.Module, family: Family) -> dict[str, tuple[nn.Module, Style]]:
    """The submodules in the plan, by path, with their styles."""
    found: dict[str, tuple[nn.Module, Style]] = {}
    for pattern, style in family.plan.items():
        for path, part in matching(module, pattern):
            found[path] = (part, style)
    return found


def shards(module: nn.Module, family: Family) -> dict[str, Shard]:
    """Parameter name to shard; parameters without an entry stay whole on every rank."""
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
    """The sizes of a packed weight's blocks, by the style's own proportions or else the class's."""
    if isinstance(style, str):
        return (total,)
    parts: Any = style.blocks if style.blocks is not None else getattr(part, attribute)
    unit, rest = divmod(total, sum(parts))
    if rest:
        raise CannotDivide(f"the {total} features of a {type(part).__name__} do not divide into blocks like {parts}")
    return tuple(unit * block for block in parts)


def degrees(module: nn.Module, family: Family, max_degree: int = 64) -> list[int]:
    """The tensor-parallel degrees up to ``max_degree`` that divide everything that the plan divides.

    Only 1 if the configuration differs from what the plan requires.
    """
    return [degree for degree in range(1, max_degree + 1) if degree == 1 or undividable(module, family, degree) is None]


def undividable(module: nn.Module, family: Family, degree: int) -> str | None:
    """The reason why ``degree`` cannot divide the module, with the number that it does not divide, or ``None``."""
    for name, value in family.needs.items():
        if (own := setting(module, name)) != value:
            return f"its {name} is {own}, and the plan supports only {value}"
    required = _without(family, family.parts)
    return _not_divided(module, family.heads, shards(module, required), degree)


def fit(module: nn.Module, family: Family, degree: int) -> tuple[Family, dict[str, str]]:
    """The family without the parts that ``degree`` does not divide, and the reason for each of their paths."""
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
    """The family without the plan's entries at or below ``paths``."""
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
    """A value of the module's diffusers configuration, or of its transformers text configuration."""
    config: Any = module.config
    return config[name] if isinstance(config, Mapping) else getattr(config.get_text_config(), name)
