"""The components of a pipeline's directory that diffusers loads, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ....formats.checkpoint import check_tensor_file
from ....formats.pipeline_index import read_index, read_object
from ....formats.tensor_files import STEMS, BadTensorFile, weight_files
from ....protocol.errors import StartFailed
from ...internals import diffusers as internals

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Component:
    """One component of a pipeline's directory. Its weights are those of ``variant``."""

    name: str
    cls: type
    folder: Path
    variant: str | None = None

    @property
    def is_model(self) -> bool:
        """True if its library loads weights for it."""
        return issubclass(self.cls, ModelMixin | PreTrainedModel)

    @property
    def files(self) -> list[Path]:
        """The weight files that its library loads; empty where there are none. Raises ``BadTensorFile``."""
        if issubclass(self.cls, PreTrainedModel):
            return _named_by_config(self.folder) or weight_files(self.folder, self.variant, STEMS[1:])
        return weight_files(self.folder, self.variant, STEMS[:1])


def pipeline_class(directory: Path) -> type[DiffusionPipeline]:
    """The diffusers class of the pipeline in ``directory``; ``DiffusionPipeline`` where the index names none."""
    name = read_index(directory).class_name
    found = getattr(diffusers, name, None) if name is not None else None
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else DiffusionPipeline


def components(directory: Path, variant: str | None = None) -> dict[str, Component]:
    """The components that diffusers loads from ``directory``, by name, each with the class that the index names.

    Entries that the pipeline's class does not take are ignored. Raises ``StartFailed`` where an entry that it takes
    names no class, and where no component has the variant.
    """
    cls, values = pipeline_class(directory), read_index(directory).values
    expected, _ = cls._get_signature_keys(cls)
    variants = _variants(directory, variant, values)
    found = {}
    for name in expected:
        entry = values.get(name, [None, None])
        if not isinstance(entry, list) or len(entry) != 2:
            raise StartFailed(f"The component {name} of {directory} has no class: model_index.json says {entry!r}.")
        if entry[0] is not None:
            folder = directory / name
            folder = folder if folder.is_dir() else directory  # where diffusers then looks for it
            found[name] = Component(name, _class(directory, name, *entry), folder, variants.get(name))
    return found


def component_classes(directory: Path) -> dict[str, type[nn.Module]]:
    """The classes of the components with weights."""
    return {name: component.cls for name, component in components(directory).items() if _has_weights(component)}


def _has_weights(component: Component) -> bool:
    return issubclass(component.cls, nn.Module)


def _variants(directory: Path, variant: str | None, values: Mapping[str, object]) -> dict[str, str]:
    """The components that have files of ``variant``; diffusers takes the plain files of the others."""
    if variant is None:
        return {}
    find = internals.identify_model_variants
    found: dict[str, str] = find(folder=str(directory), variant=variant, config=dict(values))
    if not found:
        raise StartFailed(f"No component of {directory} has weights of the variant {variant!r}; leave --variant out.")
    return found


def _class(directory: Path, name: str, library: str, class_name: str) -> type:
    """The class as diffusers finds it. Raises ``StartFailed``."""
    try:
        cls, _ = internals.get_class_obj_and_candidates(
            library,
            class_name,
            internals.ALL_IMPORTABLE_CLASSES,
            diffusers.pipelines,
            hasattr(diffusers.pipelines, library),
            component_name=name,
            cache_dir=str(directory),
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise StartFailed(
            f"The component {name} of {directory} cannot be loaded: model_index.json names its class as "
            f"{library!r}, {class_name!r} ({str(error).splitlines()[0]})."
        ) from error
    found: type = cls
    return found


def inspect(component: Component) -> None:
    """Raise ``StartFailed``, with the cure, where files to load are missing or broken."""
    folder = component.folder
    if folder.name != component.name and not any(folder.glob("*config.json")):
        raise StartFailed(
            f"The model lacks its component {component.name}: there is no directory {folder / component.name}; "
            "download or save the pipeline again."
        )
    if not component.is_model:
        return
    if not (folder / _CONFIG).is_file():
        raise StartFailed(
            f"The component {component.name} has no {_CONFIG} in {folder}; download or save the pipeline again."
        )
    read_object(folder / _CONFIG)
    try:
        files = component.files
    except BadTensorFile as error:
        raise StartFailed(
            f"The component {component.name} in {folder} is incomplete: {error}; download it again."
        ) from None
    if not files:
        raise StartFailed(_without_weights(component))
    for file in files:
        check_tensor_file(file)


def _without_weights(component: Component) -> str:
    folder = component.folder
    start = f"The component {component.name} has"
    stem = STEMS[1] if issubclass(component.cls, PreTrainedModel) else STEMS[0]
    variants = sorted({file.name.split(".")[1].split("-")[0] for file in folder.glob(f"{stem}.*.safetensors")})
    if variants:
        flag = " or ".join(f"--variant {variant}" for variant in variants)
        return f"{start} weights of the variant {' and '.join(variants)} only, in {folder}; start with {flag}."
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        return (
            f"{start} only pickled weights ({folder / pickled[0]}), which can run code and are never loaded; "
            "convert them with `save_pretrained(..., safe_serialization=True)`."
        )
    return (
        f"{start} no weights: there is no {stem}.safetensors in {folder}, nor an index of its parts; "
        "download or save the pipeline again."
    )


def _named_by_config(folder: Path) -> list[Path]:
    """The file that ``transformers_weights`` in the configuration names, if any."""
    named = read_object(folder / _CONFIG).get("transformers_weights") if (folder / _CONFIG).is_file() else None
    return [folder / named] if isinstance(named, str) and named.endswith(".safetensors") else []
