"""Loads one component of a checkpoint through its layout: each rank reads only the parts that it keeps.

The module is made without memory, then divided and fused, and then filled from the files.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ...internals import transformers as internals
from ...parallel.divide import divide
from ...parallel.plan import CannotDivide, Family, Shard, degrees, fit, shards, undividable
from ...parallel.ranks import ALONE, Ranks
from .aliases import names_of
from .files import WeightFiles
from .fuse import fuse
from .layout import Layout, entries
from .names import ignored_names


class CannotLoad(Exception):
    """A component's files do not fit its class, or the component cannot be divided as asked; the message says why."""


class WrongDegree(CannotLoad):
    """The tensor-parallel degree does not divide the component. ``why`` omits the degrees that do."""

    def __init__(self, why: str, possible: Iterable[int]) -> None:
        super().__init__(f"{why}; --tp can be {', '.join(map(str, possible))}")
        self.why = why


class StoredTensors(Protocol):
    """Whole tensors by checkpoint name, in open files or in memory."""

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class LoadedComponent:
    """A component and its layout. ``whole`` maps the parts that every rank has whole to the reason."""

    module: nn.Module
    layout: Layout
    whole: Mapping[str, str] = field(default_factory=dict)


def load_component(
    cls: type[nn.Module],
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    family: Family | None = None,
    ranks: Ranks = ALONE,
    fused: bool = False,
    tensors: StoredTensors | None = None,
) -> LoadedComponent:
    """Load this rank's part of the component that ``folder`` configures onto ``device``.

    ``tensors`` replaces the files in ``folder``. Raises ``CannotLoad`` where tensors are missing, unexpected or of
    another shape, and where the component cannot be divided among ``ranks``.
    """
    module = make(cls, folder, dtype)
    with contextlib.ExitStack() as stack:
        stored = tensors if tensors is not None else stack.enter_context(WeightFiles(folder))
        names = _names(module, stored)
        try:
            layout, whole = _arrange(module, names, family, ranks, fused, folder.name)
        except CannotDivide as error:
            raise CannotLoad(str(error)) from error
        _materialise(module, dtype, device)
        for name, _ in names:
            try:
                layout.write(name, stored[name])
            except ValueError as error:
                raise CannotLoad(f"{folder}: {error}") from error
    if isinstance(module, PreTrainedModel):
        module.tie_weights()
    layout.names = names_of(module, layout, _own_name(module))
    return LoadedComponent(module.eval().requires_grad_(False), layout, whole)


def layout_of(module: nn.Module, tensors: StoredTensors) -> Layout:
    """The layout of a whole component that its own library has loaded from ``tensors``.

    Raises ``CannotLoad`` where the library computes its tensors from others, or ignores some that are there.
    """
    layout = Layout(module, entries(module, _names(module, tensors), {}))
    layout.names = names_of(module, layout, _own_name(module))
    return layout


def possible_degrees(cls: type[nn.Module], folder: Path, family: Family) -> set[int]:
    """The tensor-parallel degrees that divide the component in ``folder``."""
    return set(degrees(make(cls, folder, torch.float32), family))


def make(cls: type[nn.Module], folder: Path, dtype: torch.dtype) -> nn.Module:
    """The module with its buffers, and with parameters that have no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            return _new(cls, folder, dtype)
    finally:
        torch.set_default_dtype(before)


def _new(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:  # Any: neither base class declares these makers
    made: nn.Module
    if issubclass(cls, PreTrainedModel):
        made = cls._from_config(cls.config_class.from_pretrained(folder), dtype=dtype)
    elif issubclass(cls, ModelMixin):
        made = cls.from_config(cls.load_config(folder))
    else:
        raise CannotLoad(f"{cls.__name__} is a class of neither diffusers nor transformers")
    return made


def _names(module: nn.Module, files: StoredTensors) -> list[tuple[str, str]]:
    """Pairs of a file's tensor name and the name in the module's state dict."""
    known = module.state_dict()
    ignored = [re.compile(pattern) for pattern in ignored_names(module)]
    wanted = [name for name in files if name in known or not any(pattern.search(name) for pattern in ignored)]
    rename = _renaming(module, known)
    names = [(name, rename(name)) for name in wanted]
    unexpected = [name for name, own in names if own not in known]
    loaded = {_identity(known[own]) for _, own in names if own in known}
    missing = [own for own, tensor in known.items() if _identity(tensor) not in loaded and not _is_tied(module, own)]
    if unexpected or missing:
        raise CannotLoad(
            f"the tensors of {type(module).__name__} are not those of its files: "
            f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    return names


def _identity(tensor: torch.Tensor) -> int:
    return id(tensor)


def _is_tied(module: nn.Module, name: str) -> bool:
    return name in (getattr(module, "all_tied_weights_keys", None) or {})


def _own_name(module: nn.Module) -> Callable[[str], str]:
    """Maps checkpoint names to the module's names, without keeping tensors alive."""
    rename = _renaming(module, dict.fromkeys(module.state_dict(), True))

    def own(name: str) -> str:
        try:
            return rename(name)
        except CannotLoad:
            return name

    return own


def _renaming(module: nn.Module, known: Mapping[str, object]) -> Callable[[str], str]:
    """Maps checkpoint names to transformers' current names; diffusers' names are those of the state dict."""
    if not isinstance(module, PreTrainedModel):
        return lambda name: name
    conversions = internals.get_model_conversion_mapping(module)
    renamings = [conversion for conversion in conversions if isinstance(conversion, internals.WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, internals.WeightConverter)]

    def rename(name: str) -> str:
        prefix = module.base_model_prefix
        renamed, converted = internals.rename_source_key(name, renamings, converters, prefix, dict(known))
        if converted is not None:
            raise CannotLoad(f"transformers computes {renamed} of {type(module).__name__} from {name} and others")
        return str(renamed)

    return rename


def _arrange(
    module: nn.Module, names: list[tuple[str, str]], family: Family | None, ranks: Ranks, fused: bool, called: str
) -> tuple[Layout, dict[str, str]]:
    """Divide and fuse the module, which has no memory yet.

    Returns its layout, and the parts that every rank has whole.
    """
    divided: dict[str, Shard] = {}
    whole: dict[str, str] = {}
    if ranks.size > 1:
        what = f"the {called} ({type(module).__name__})"
        if family is None:
            raise WrongDegree(f"there is no tensor-parallel plan for {what}", [1])
        if (reason := undividable(module, family, ranks.size)) is not None:
            why = f"{what} cannot be divided among {ranks.size} ranks, because {reason}"
            raise WrongDegree(why, degrees(module, family))
        family, whole = fit(module, family, ranks.size)
        divided = shards(module, family)
    placed = entries(module, names, divided)
    if family is not None:
        if ranks.size > 1:
            divide(module, family, ranks, divided)
        if fused:
            placed = fuse(module, family, placed)
    return Layout(module, placed, ranks), whole


def _materialise(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter memory on ``device``, and move the buffers there."""
    wide = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if isinstance(module, PreTrainedModel) and dtype != torch.float16:
        wide = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    made: dict[int, nn.Parameter] = {}
    for path, part in module.named_modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            own = dtype if parameter.is_floating_point() else parameter.dtype
            if parameter.is_floating_point() and wide & {*path.split("."), name}:
                own = torch.float32
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty_like(parameter, dtype=own, device=device), False)
            setattr(part, name, made[id(parameter)])
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))
