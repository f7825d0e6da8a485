"""The repeated blocks of a model: the layers that it stacks, which hold most of its weights and do most of its work.

diffusers names the classes of some models' blocks (``_repeated_blocks``). For the others, blocks follow from the
structure: they are elements of module lists whose class has at least two elements with the same parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_COMPILED = "_orig_mod"
"""The name under which ``torch.compile(module)`` keeps the module."""

_OURS = __name__.rpartition(".")[0].rpartition(".")[0]
"""The package of the worker, whose classes stand before a library's (overlays)."""

MINOR = 0.1
"""Elements with less than this share of the largest class's parameters do not count: a vision tower's, a merger's."""

LEAST = 0.5
"""Blocks hold at least this share of what contains them in a module list. The parts of a single block do not."""


class NoBlocks(Exception):
    """A model has no repeated blocks. The message says what was looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class RepeatedBlocks:
    """The blocks of one class, as the library defines it, by their dotted names in the model, in its order."""

    cls: type[nn.Module]
    modules: Mapping[str, nn.Module]


def repeated_blocks(model: nn.Module) -> tuple[RepeatedBlocks, ...]:
    """The repeated blocks of ``model``, one entry for each class; no block contains another.

    Names are those of a model that is not compiled, and valid for ``get_submodule`` of a compiled one, too. Raises
    ``NoBlocks``.
    """
    elements = dict(_elements(model))
    declared = _declared(model)
    named = {name: block for name, block in elements.items() if library_class(block).__name__ in declared}
    found = _by_class(_outermost(named))
    if not found:
        repeated = _repeated_classes(elements.values())
        alike = {name: block for name, block in elements.items() if library_class(block) in repeated}
        found = _major(_by_class(_outermost(alike)), elements)
    if not found:
        raise NoBlocks(_reason(model, declared, elements))
    return found


def library_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without the classes that the worker puts before it."""
    classes = (cls for cls in type(module).__mro__ if not cls.__module__.startswith(f"{_OURS}."))
    return next(cls for cls in classes if issubclass(cls, nn.Module))


def _declared(model: nn.Module) -> frozenset[str]:
    """The names of the classes that diffusers declares for ``model``."""
    names: Sequence[str] | None = getattr(library_class(_uncompiled(model)), "_repeated_blocks", None)
    return frozenset(names or ())


def _elements(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every element of a module list with a dotted name, those of outer lists before those of inner ones."""
    seen = set[int]()
    for name, part in model.named_modules():
        for key, child in part.named_children() if isinstance(part, nn.ModuleList) else ():
            element = _uncompiled(child)
            if id(element) not in seen:  # a block may stand in several lists
                seen.add(id(element))
                yield ".".join(step for step in f"{name}.{key}".split(".") if step and step != _COMPILED), element


def _uncompiled(module: nn.Module) -> nn.Module:
    while (inner := module._modules.get(_COMPILED)) is not None:
        module = inner
    return module


def _repeated_classes(elements: Iterable[nn.Module]) -> frozenset[type[nn.Module]]:
    """The classes that have two elements with the same parameters; a UNet's levels differ."""
    candidates = (part for part in elements if not isinstance(part, _CONTAINERS) and any(True for _ in part.children()))
    forms = Counter((library_class(part), _form(part)) for part in candidates)
    return frozenset(cls for (cls, form), number in forms.items() if number > 1 and form)


def _form(block: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _outermost(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The ``blocks`` that are not within another one."""
    return {name: block for name, block in blocks.items() if not any(outer in blocks for outer in _outer_names(name))}


def _outer_names(name: str) -> Iterator[str]:
    steps = name.split(".")
    return (".".join(steps[:depth]) for depth in range(1, len(steps)))


def _by_class(blocks: Mapping[str, nn.Module]) -> tuple[RepeatedBlocks, ...]:
    grouped: dict[type[nn.Module], dict[str, nn.Module]] = {}
    for name, block in blocks.items():
        grouped.setdefault(library_class(block), {})[name] = block
    return tuple(RepeatedBlocks(cls, modules) for cls, modules in grouped.items())


def _major(found: Sequence[RepeatedBlocks], elements: Mapping[str, nn.Module]) -> tuple[RepeatedBlocks, ...]:
    """The classes of ``found`` that count; none if they leave most of the ``elements`` that contain them out."""
    sizes = [sum(_size(block) for block in group.modules.values()) for group in found]
    names = {name for group in found for name in group.modules}
    outer = names.union(*map(_outer_names, names))
    if sum(sizes) < LEAST * sum(_size(element) for name, element in _outermost(elements).items() if name in outer):
        return ()
    return tuple(group for group, size in zip(found, sizes, strict=True) if size >= MINOR * max(sizes))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _reason(model: nn.Module, declared: Iterable[str], elements: Mapping[str, nn.Module]) -> str:
    lists = Counter((name.rpartition(".")[0], library_class(block).__name__) for name, block in elements.items())
    looked = ", ".join(f"{name} ({number} {cls})" for (name, cls), number in lists.items()) or "none"
    return (
        f"{library_class(_uncompiled(model)).__name__} has no repeated blocks: diffusers names the classes "
        f"{', '.join(sorted(declared)) or '(none)'}, and its module lists are: {looked}. "
        "Blocks are elements of a named class, or of a class that has two elements with the same parameters"
    )
