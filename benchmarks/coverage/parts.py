"""From a pipeline's constructor to its tiny components."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from transformers import PreTrainedTokenizerBase

from . import autoencoders, image_transformers, schedulers, unets, video_transformers
from .encoders import ENCODERS, SEEING, Encoder
from .tokenizing import PICTURES, PROCESSORS, TOKENIZERS, tokenizer_for

EXTRAS = frozenset(
    (
        *("feature_extractor", "image_encoder", "safety_checker", "watermarker", "transformer_2", "processor"),
        *("prompt_enhancer", "prompt_enhancer_head", "duration_head", "audio_scheduler", "pe", "pe_tokenizer"),
        *("sound_tokenizer", "prior_feature_extractor", "prior_image_encoder", "latent_upscaler"),
    )
)
"""Components that pipelines can do without."""


class NoForm(Exception):
    """There is no tiny form of what a pipeline asks for."""


@dataclass(frozen=True, slots=True)
class Other:
    """A component of another class than the constructor names first, with arguments over those of its form."""

    name: str
    arguments: Mapping[str, Any] | None = None


MODELS: dict[str, dict[str, Any]] = (
    image_transformers.FORMS | video_transformers.FORMS | unets.FORMS | autoencoders.FORMS
)


class Parts:
    """The components of ``pipeline``, as its constructor takes them.

    ``changes`` are by the constructor's names: ``...`` for an optional component that is included, arguments over
    those of its form, an :class:`Other` class, a function of the tokenizer, or the value itself.
    """

    def __init__(self, pipeline: type[DiffusionPipeline], changes: Mapping[str, Any]) -> None:
        self._pipeline = pipeline
        self._changes = changes
        self._asked = _asked_classes(pipeline)
        self._tokenizers: dict[str, Any] = {}

    def make(self) -> dict[str, Any]:
        """Every component; options are left to the pipeline's own defaults where no change names them."""
        self._refuse_unloadable()
        names = sorted(self._asked, key=lambda name: "tokenizer" not in name)
        found = {name: self._part(name) for name in names}
        return {name: value for name, value in found.items() if value is not _LEFT_OUT}

    def _part(self, name: str) -> Any:
        change = self._changes.get(name, _LEFT_OUT)
        arguments = dict(change) if isinstance(change, dict) else {}
        if isinstance(change, Other):
            return self._component(name, [change.name], dict(change.arguments or {}))
        if inspect.isfunction(change):
            return change(self._tokenizer(name))
        if change is _LEFT_OUT and name in EXTRAS and self._can_miss(name):
            return None
        if change is _LEFT_OUT or change is ... or isinstance(change, dict):
            return self._component(name, self._asked[name], arguments)
        return change

    def _component(self, name: str, asked: list[str], arguments: dict[str, Any]) -> Any:
        """The first of the ``asked`` classes that there is a form of."""
        if "tokenizer" in name and not any(cls in PROCESSORS for cls in asked):
            return self._own_tokenizer(name, asked)
        for cls in asked:
            if cls in PROCESSORS:
                return PROCESSORS[cls](self._tokenizers.get("tokenizer") or TOKENIZERS["Qwen2Tokenizer"]())
            if cls in PICTURES:
                return PICTURES[cls]()
            if cls in SEEING:
                return SEEING[cls]()
            if cls in ENCODERS:
                return ENCODERS[cls](self._tokenizer(name))
            if cls in MODELS:
                return find_class(cls, self._pipeline)(**(MODELS[cls] | arguments))
            if cls.endswith("Scheduler") and hasattr(diffusers, cls):
                return schedulers.make_scheduler(cls, arguments)
            if cls == KarrasDiffusionSchedulers.__name__:
                return schedulers.make_scheduler(schedulers.FOR_ANY, arguments)
        return self._unknown(name, asked)

    def _can_miss(self, name: str) -> bool:
        default = inspect.signature(self._pipeline.__init__).parameters[name].default
        return default is not inspect.Parameter.empty or name in self._pipeline._optional_components

    def _unknown(self, name: str, asked: list[str]) -> Any:
        parameter = inspect.signature(self._pipeline.__init__).parameters[name]
        if parameter.default is inspect.Parameter.empty:
            raise NoForm(f"there is no tiny form of {' or '.join(asked) or name}")
        return _LEFT_OUT

    def _refuse_unloadable(self) -> None:
        """Classes of deprecated modules are saved under a name that diffusers does not find again."""
        module = importlib.import_module(self._pipeline.__module__)
        for cls in (cls for name, asked in self._asked.items() if name not in self._changes for cls in asked):
            if ".deprecated." in getattr(getattr(module, cls, None), "__module__", "") and "Safety" not in cls:
                raise NoForm(f"diffusers does not load checkpoints with its deprecated {cls}")

    def _own_tokenizer(self, name: str, asked: list[str]) -> Any:
        encoder = next((self._encoder_class(other) for other in self._asked if _tokenizer_of(other) == name), "")
        wanted = next((cls for cls in asked if cls in TOKENIZERS), "")
        self._tokenizers[name] = tokenizer_for(wanted, encoder)
        return self._tokenizers[name]

    def _encoder_class(self, name: str) -> str:
        change = self._changes.get(name)
        return change.name if isinstance(change, Other) else next(iter(self._asked[name]), "")

    def _tokenizer(self, name: str) -> Any:
        """The tokenizer of the text encoder ``name``, or the only one that there is."""
        own = self._tokenizers.get(_tokenizer_of(name))
        found = own or next(iter(self._tokenizers.values()), None)
        processor = found if found is not None else TOKENIZERS["Qwen2Tokenizer"]()
        return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


_LEFT_OUT = object()


def _tokenizer_of(encoder: str) -> str:
    """The name of the tokenizer that goes with a component: "prior_text_encoder" has "prior_tokenizer"."""
    return encoder.replace("text_encoder", "tokenizer") if "text_encoder" in encoder else ""


def _asked_classes(pipeline: type[DiffusionPipeline]) -> dict[str, list[str]]:
    """The names in each constructor parameter's annotation, by parameter."""
    parameters = inspect.signature(pipeline.__init__).parameters
    return {name: _names(parameters[name].annotation) for name in parameters if name != "self"}


def _names(annotation: Any) -> list[str]:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return [word for word in re.findall(r"\w+", text) if word[0].isupper()]


def find_class(name: str, pipeline: type[DiffusionPipeline]) -> Any:
    """The class ``name`` of diffusers, or of the module or package that ``pipeline`` comes from."""
    module = importlib.import_module(pipeline.__module__)
    package = importlib.import_module(pipeline.__module__.rpartition(".")[0])
    found = next((getattr(place, name) for place in (diffusers, module, package) if hasattr(place, name)), None)
    if found is None:
        raise NoForm(f"{name} cannot be imported")
    return found


__all__ = ["Encoder", "NoForm", "Other", "Parts"]
