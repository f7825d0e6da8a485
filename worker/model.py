"""The model that a replica serves: its pipeline, loaded, and what can be asked of it."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..protocol.config import Config
from ..protocol.errors import StartFailed
from ..protocol.messages import Batching, ModelInfo, Parameter
from ..protocol.models import resolve_model
from .arguments import call_arguments
from .module_state import ModuleState
from .parallel.ranks import ALONE, Ranks
from .sizes import DENOISERS, Sizes, denoiser_config, find_sizes
from .weights.layout import Layout
from .weights.loader import CannotLoad
from .weights.pipeline import load_known_components

log = logging.getLogger(__name__)

INITIAL_VERSION = "0"
"""The weight version of a checkpoint as it was loaded."""

_DEFAULT_FPS = 16

_NO_LIMIT = 100_000
"""Transformers writes a number far beyond this one where a tokenizer has no limit."""

_LONGEST_TEXT = 4096
"""Tokens, for pipelines that name no default and tokenizers that name no limit."""


@dataclass(slots=True)
class Model:
    """A loaded pipeline with its facts.

    ``layouts`` are of every component with weights; ``defaults`` are arguments passed where a request gives none.
    """

    name: str
    path: str
    pipeline: DiffusionPipeline
    device: torch.device
    dtype: torch.dtype
    kind: Literal["image", "video"]
    arguments: dict[str, Parameter]
    sizes: Sizes
    layouts: dict[str, Layout]
    defaults: dict[str, Any]
    output_type: Literal["pt", "np"] = "pt"
    weight_version: str = INITIAL_VERSION
    pristine: ModuleState | None = None
    """What the modules are restored to after each request; only for pipelines that change them."""

    @property
    def default_fps(self) -> int | None:
        if self.kind == "image":
            return None
        rate = self.arguments.get("frame_rate")
        return int(rate.default) if rate is not None and rate.default else _DEFAULT_FPS

    def info(self, batching: Batching, supports_preview: bool) -> ModelInfo:
        frames = self.arguments.get("num_frames")
        return ModelInfo(
            model=self.name,
            path=self.path,
            pipeline=type(self.pipeline).__name__,
            kind=self.kind,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            parameters=_count_parameters(self.pipeline),
            arguments=self.arguments,
            size_multiple=self.sizes.multiple,
            default_width=self.sizes.width,
            default_height=self.sizes.height,
            default_num_frames=frames.default if frames is not None else None,
            default_fps=self.default_fps,
            supports_preview=supports_preview,
            batching=batching,
            weight_version=self.weight_version,
        )


def load_model(config: Config, device: torch.device | None = None, ranks: Ranks = ALONE) -> Model:
    """Load the configured pipeline, or this rank's part of it, onto ``device`` (:func:`find_device`'s by default).

    Raises ``StartFailed`` with one sentence for the operator when the checkpoint cannot be loaded.
    """
    device = device or find_device(config)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    path = str(resolve_model(config.model))
    pipeline, dtype, layouts = _load_pipeline(path, config, device, ranks)
    pipeline.set_progress_bar_config(disable=True)
    _forget_caches(pipeline)
    arguments = _bounded(call_arguments(type(pipeline)), pipeline, config)
    sizes = find_sizes(pipeline, arguments)
    return Model(
        name=config.served_model_name or config.model.rstrip("/").rsplit("/", 1)[-1],
        path=path,
        pipeline=pipeline,
        device=device,
        dtype=dtype,
        kind="video" if "num_frames" in arguments else "image",
        arguments=arguments,
        sizes=sizes,
        layouts=layouts,
        defaults=sizes.overrides | default_text_length(pipeline, arguments) | _binning(pipeline, arguments),
    )


def _load_pipeline(
    path: str, config: Config, device: torch.device, ranks: Ranks
) -> tuple[DiffusionPipeline, torch.dtype, dict[str, Layout]]:
    try:
        directory = find_directory(path)
        dtype = _dtype(config, device, directory)
        # a whole model as diffusers loads it: where its weights lie in memory decides the last bits of its products
        fused = config.fuse_projections
        own = load_known_components(directory, dtype, device, ranks, fused=fused) if fused or ranks.size > 1 else {}
        modules = {name: loaded.module for name, loaded in own.items()}
        pipeline = DiffusionPipeline.from_pretrained(directory, dtype=dtype, use_safetensors=True, **modules).to(device)
        layouts = {
            name: own[name].layout if name in own else Layout.whole(part)
            for name, part in pipeline.components.items()
            if isinstance(part, nn.Module)
        }
        return pipeline, dtype, layouts
    except CannotLoad as error:
        raise StartFailed(f"The model {path} could not be loaded: {error}.") from error
    except Exception as error:  # the libraries raise errors of every kind; each ends this start, with its own words
        log.exception("loading %s failed", path)
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StartFailed(
            f"The model {path} could not be loaded as a diffusers pipeline ({type(error).__name__}: {what}); "
            "check that `DiffusionPipeline.from_pretrained` loads it from safetensors files."
        ) from error


def find_directory(path: str) -> Path:
    """The checkpoint's directory, downloaded first where ``path`` is a hub id."""
    return Path(path if Path(path).is_dir() else DiffusionPipeline.download(path, use_safetensors=True))


def find_device(config: Config, replica: int = 0, rank: int = 0) -> torch.device:
    """The device of a rank: GPUs in turn, each rank of a replica its own. Raises ``StartFailed`` without one."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise StartFailed("--device cuda was asked for, but torch finds no CUDA device; use --device cpu or auto.")
    if not available or config.device == "cpu":
        return torch.device("cpu")
    if config.tp > torch.cuda.device_count():
        raise StartFailed(f"--tp {config.tp} needs a GPU for each rank, and there are {torch.cuda.device_count()}.")
    return torch.device("cuda", (replica * config.tp + rank) % torch.cuda.device_count())


def _dtype(config: Config, device: torch.device, directory: Path) -> torch.dtype:
    if config.dtype != "auto":
        found: torch.dtype = getattr(torch, config.dtype)
        return found
    if device.type == "cuda" or (_multiplies_bfloat16() and stored_dtype(directory) == "BF16"):
        return torch.bfloat16
    return torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers (AVX-512 BF16, AMX, or Arm's)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def stored_dtype(directory: Path) -> str | None:
    """The dtype, as safetensors names it, of most parameters in the denoiser's first file; ``None`` without a file.

    Of a checkpoint with variants ("…model.fp16.safetensors") that is the plain file, which is the one that is loaded.
    """
    plain = re.compile(r"diffusion_pytorch_model(-00001-of-\d+)?\.safetensors")
    folders = (directory / name for name in DENOISERS)
    files = (file for folder in folders if folder.is_dir() for file in folder.iterdir() if plain.fullmatch(file.name))
    first = next(files, None)
    if first is None:
        return None
    sizes = Counter[str]()
    with safe_open(first, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # it is no dictionary
            tensor = opened.get_slice(name)
            sizes[tensor.get_dtype()] += math.prod(tensor.get_shape())
    return sizes.most_common(1)[0][0]


def _forget_caches(pipeline: DiffusionPipeline) -> None:
    """Language models as text encoders return a key-value cache that no pipeline reads; leave it out.

    It is large, cannot be cut into rows, and does not change the other outputs.
    """
    for component in pipeline.components.values():
        if isinstance(component, PreTrainedModel):
            forget_cache(component)


def forget_cache(model: PreTrainedModel) -> None:
    """Have ``model`` return no key-value cache."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "use_cache", False) and not getattr(config, "is_encoder_decoder", False):
            config.use_cache = False


def default_text_length(pipeline: DiffusionPipeline, arguments: Mapping[str, Parameter]) -> dict[str, int]:
    """The pipeline's default text length, cut to the longest text that any of the model's tokenizers is made for."""
    parameter, longest = arguments.get("max_sequence_length"), _longest_text(pipeline)
    if parameter is None or not isinstance(parameter.default, int) or longest is None or longest >= parameter.default:
        return {}
    return {"max_sequence_length": longest}


def _longest_text(pipeline: DiffusionPipeline) -> int | None:
    """Tokens that the most capable of the model's tokenizers is made for; ``None`` when none says."""
    limits = [getattr(part, "model_max_length", None) for part in pipeline.components.values()]
    return max((limit for limit in limits if isinstance(limit, int) and limit < _NO_LIMIT), default=None)


def _bounded(arguments: dict[str, Parameter], pipeline: DiffusionPipeline, config: Config) -> dict[str, Parameter]:
    """Arguments with a maximum where a larger value would only cost time and memory."""
    bounded = dict(arguments)
    for name, parameter in arguments.items():
        if name.endswith("num_inference_steps"):
            bounded[name] = msgspec.structs.replace(parameter, maximum=config.max_steps)
        if name == "max_sequence_length":
            longest = max(parameter.default or 0, _longest_text(pipeline) or 0) or _LONGEST_TEXT
            bounded[name] = msgspec.structs.replace(parameter, maximum=longest)
    return bounded


def _binning(pipeline: DiffusionPipeline, arguments: Mapping[str, Parameter]) -> dict[str, bool]:
    """Leave out the rounding to known aspect ratios where there is no table of them for the model's size."""
    sizes_with_a_table = (16, 32, 64, 128, 256)
    if "use_resolution_binning" not in arguments or denoiser_config(pipeline).get("sample_size") in sizes_with_a_table:
        return {}
    return {"use_resolution_binning": False}


def _count_parameters(pipeline: DiffusionPipeline) -> dict[str, int]:
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
