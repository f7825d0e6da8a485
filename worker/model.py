"""The model that a replica serves: its pipeline, loaded, and what can be asked of it."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ..protocol.config import Config
from ..protocol.errors import InvalidRequest, StartFailed
from ..protocol.messages import BatchingMode, Generate, ImageTask, ModelInfo
from ..protocol.models import resolve_model
from .frame_rate import frame_rate
from .module_state import ModuleState
from .parallel.ranks import ALONE, Ranks
from .published import Published, read_published
from .rollout.sampling import why_no_rollouts
from .sizes import DENOISERS
from .task import Task, new_task
from .weights.layout import Layout
from .weights.loader import CannotLoad
from .weights.pipeline import load_pipeline

log = logging.getLogger(__name__)

INITIAL_VERSION = "0"
"""The weight version of a checkpoint as it was loaded."""


@dataclass(slots=True)
class Model:
    """A loaded pipeline with what it does: ``text`` from a prompt alone, ``image`` from a prompt and images.

    The self-test decides which of the two there are, and ``no_image`` says why the second is not there. ``layouts``
    are of every component with weights; ``published`` is what the checkpoint says of itself.
    """

    name: str
    path: str
    pipeline: DiffusionPipeline
    device: torch.device
    dtype: torch.dtype
    layouts: dict[str, Layout]
    published: Published
    text: Task | None
    image: Task | None = None
    no_image: str = "it was not tried"
    weight_version: str = INITIAL_VERSION
    pristine: ModuleState | None = None
    """What the modules are restored to after each request; only for pipelines that change them."""

    @property
    def main(self) -> Task:
        """What is done for a request that brings no more than it must."""
        task = self.text or self.image
        assert task is not None, "a model does something"
        return task

    def task(self, request: Generate) -> Task:
        """What is done for ``request``. Raises ``InvalidRequest`` where the model does no such thing."""
        task = self.image if request.images else self.text
        if task is None:
            raise InvalidRequest(f"this model takes {'no image' if request.images else 'an image'}", field="image")
        return task

    def batching_mode(self, request: Generate) -> BatchingMode:
        """How ``request`` shares the components with others, as far as its task is concerned."""
        task = self.image if request.images else self.text
        return "merged" if task is None else task.batching.mode

    def frame_rate(self, task: Task) -> int:
        """Frames a second of a clip, where a request says nothing of it."""
        return self.published.fps or frame_rate(type(task.pipeline), task.arguments, task.defaults)

    def is_finite(self) -> bool:
        """Whether every parameter of this rank is."""
        return all(bool(parameter.isfinite().all()) for parameter in _parameters(self.pipeline))

    def info(self) -> ModelInfo:
        task = self.main
        frames = task.arguments.get("num_frames")
        return ModelInfo(
            model=self.name,
            path=self.path,
            pipeline=type(task.pipeline).__name__,
            kind=task.kind,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            parameters=_count_parameters(self.pipeline),
            arguments=task.arguments,
            size_multiple=task.sizes.multiple,
            default_width=task.sizes.width,
            default_height=task.sizes.height,
            default_num_frames=task.defaults.get("num_frames", frames.default if frames is not None else None),
            default_fps=None if task.kind == "image" else self.frame_rate(task),
            supports_preview=task.supports_preview,
            takes_text_alone=self.text is not None,
            image_task=_image_task(self.image),
            no_image=self.no_image if self.image is None else None,
            no_rollout=why_no_rollouts(self.pipeline),
            batching=task.batching,
            weight_version=self.weight_version,
            gpus=[str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())],
        )


def _image_task(task: Task | None) -> ImageTask | None:
    if task is None:
        return None
    return ImageTask(
        pipeline=type(task.pipeline).__name__,
        arguments=task.arguments,
        size_multiple=task.sizes.multiple,
        several_images=task.several_images,
        supports_preview=task.supports_preview,
        batching=task.batching,
    )


def load_model(config: Config, device: torch.device | None = None, ranks: Ranks = ALONE) -> Model:
    """Load the configured pipeline, or this rank's part of it, onto ``device`` (:func:`find_device`'s by default).

    Raises ``StartFailed`` with one sentence for the operator when the checkpoint cannot be loaded.
    """
    device = device or find_device(config)
    path = str(resolve_model(config.model))
    directory, pipeline, dtype, layouts = _load_pipeline(path, config, device, ranks)
    _forget_caches(pipeline)
    published = read_published(directory, type(pipeline))
    return Model(
        name=config.served_model_name or config.model.rstrip("/").rsplit("/", 1)[-1],
        path=path,
        pipeline=pipeline,
        device=device,
        dtype=dtype,
        layouts=layouts,
        published=published,
        text=new_task(pipeline, config, published.defaults),
    )


def _load_pipeline(
    path: str, config: Config, device: torch.device, ranks: Ranks
) -> tuple[Path, DiffusionPipeline, torch.dtype, dict[str, Layout]]:
    directory = find_directory(path)
    try:
        dtype = _dtype(config, device, directory)
        pipeline, layouts = load_pipeline(directory, dtype, device, ranks, fused=config.fuse_projections)
        return directory, pipeline, dtype, layouts
    except CannotLoad as error:
        raise StartFailed(f"The model {path} could not be loaded: {error}.") from error
    except Exception as error:  # the libraries raise errors of every kind; each ends this start, with its own words
        raise _cannot_load(path, error) from error


def find_directory(path: str) -> Path:
    """The directory of the pipeline, downloaded first where ``path`` is a hub id. Raises ``StartFailed``."""
    if Path(path).is_dir():
        if not (Path(path) / "model_index.json").is_file():
            raise StartFailed(f"The model {path} is no diffusers pipeline: the directory has no model_index.json.")
        return Path(path)
    try:
        return Path(DiffusionPipeline.download(path, use_safetensors=True))
    except Exception as error:
        raise _cannot_load(path, error) from error


def _cannot_load(path: str, error: Exception) -> StartFailed:
    log.error("loading %s failed", path, exc_info=error)
    what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return StartFailed(
        f"The model {path} could not be loaded as a diffusers pipeline ({type(error).__name__}: {what}); "
        "check that `DiffusionPipeline.from_pretrained` loads it from safetensors files."
    )


def find_device(config: Config, replica: int = 0, rank: int = 0) -> torch.device:
    """The device of a rank: GPUs in turn, each rank of a replica its own. Raises ``StartFailed`` without one."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise StartFailed("--device cuda was asked for, but torch finds no CUDA device; use --device cpu or auto.")
    if not available or config.device == "cpu":
        return torch.device("cpu")
    if torch.cuda._is_in_bad_fork():
        raise StartFailed("CUDA was opened before this worker was forked, and cannot be used in it; add --no-nursery.")
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


def _parameters(pipeline: DiffusionPipeline) -> Iterator[nn.Parameter]:
    for module in _modules(pipeline).values():
        yield from module.parameters()


def _modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _count_parameters(pipeline: DiffusionPipeline) -> dict[str, int]:
    return {name: sum(p.numel() for p in module.parameters()) for name, module in _modules(pipeline).items()}
