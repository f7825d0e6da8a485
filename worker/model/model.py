"""The model that a replica serves: its loaded pipeline and the tasks that it performs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ...formats.checkpoint import SAFETENSORS, check_directory
from ...formats.model_names import resolve_model
from ...protocol.config import Config
from ...protocol.costs import output_pixels
from ...protocol.errors import InvalidRequest, StartFailed
from ...protocol.generation import Generate
from ...protocol.replicas import Attention, BatchingMode, ImageTask, ModelInfo, Quantized
from ..crossing.facts import Facts
from ..forward.offload import Offload
from ..forward.timing import Timing
from ..parallel.device import find_device
from ..parallel.ranks import ALONE, Ranks
from ..pipelines.frame_rate import frame_rate
from ..pipelines.model_defaults import ModelDefaults, read_model_defaults
from ..rollout.peak_memory import PeakMemory
from ..rollout.sampling import why_no_rollouts
from ..weights.checkpoint.download import download_pipeline
from ..weights.checkpoint.layout import Layout
from ..weights.checkpoint.loader import CannotLoad
from ..weights.checkpoint.pipeline import LoadedPipeline, load_pipeline
from ..weights.checkpoint.single_file import SingleFile, open_single_file
from ..weights.quantizing.pipeline import quantize_pipeline
from ..weights.update.page_swap import give_own_pages
from .dtype import choose_dtype, most_common_dtype, stored_dtype
from .modules import are_finite, count_parameters, disable_kv_caches, modules
from .pipeline_task import PipelineTask, new_task
from .sequences import split_denoisers

log = logging.getLogger(__name__)

INITIAL_VERSION = "0"
"""The weight version of a checkpoint as loaded."""


@dataclass(slots=True)
class Model:
    """A loaded pipeline and its tasks: ``text`` takes a prompt alone, ``image`` a prompt and images.

    The self-test decides which of the two exist; ``no_image`` is the reason why there is no second one. ``layouts`` has
    every component with weights, ``divided`` says how the ranks share each.
    """

    name: str
    path: str
    directory: Path
    """The directory of the checkpoint's files; for a single file, that of its base pipeline."""
    pipeline: DiffusionPipeline
    device: torch.device
    dtype: torch.dtype
    layouts: dict[str, Layout]
    divided: dict[str, str]
    quantized: dict[str, Quantized]
    model_defaults: ModelDefaults
    text: PipelineTask | None
    timing: Timing
    """Measured durations of the components' calls."""
    image: PipelineTask | None = None
    no_image: str = "it was not tried"
    weight_version: str = INITIAL_VERSION
    attention: Attention | None = None
    offload: Offload | None = None
    """Brings the weights to the device, if they rest on the host."""
    facts: Facts = field(default_factory=Facts)
    """Dtypes and devices, which the forks of all requests share until an operation."""
    peak_memory: PeakMemory = field(init=False)

    def __post_init__(self) -> None:
        self.peak_memory = PeakMemory(self.device)

    def rest(self) -> None:
        """Have offloaded weights on the host alone."""
        if self.offload is not None:
            self.offload.rest()

    @property
    def main(self) -> PipelineTask:
        """The task of a request that gives only what is required."""
        task = self.text or self.image
        assert task is not None, "a model has at least one task"
        return task

    def task(self, request: Generate) -> PipelineTask:
        """The task that performs ``request``. Raises ``InvalidRequest`` when the model does not have it."""
        task = self.image if request.images else self.text
        if task is None:
            raise InvalidRequest(f"this model takes {'no image' if request.images else 'an image'}", field="image")
        return task

    def batching_mode(self, request: Generate) -> BatchingMode:
        """How the task of ``request`` may share forwards."""
        task = self.image if request.images else self.text
        return "merged" if task is None else task.batching.mode

    def frame_rate(self, task: PipelineTask) -> int:
        """Frames per second of a clip whose request gives no rate."""
        return self.model_defaults.fps or frame_rate(type(task.pipeline), task.arguments, task.defaults)

    def is_finite(self) -> bool:
        return are_finite(self.pipeline)

    @property
    def default_num_frames(self) -> int | None:
        frames = self.main.arguments.get("num_frames")
        found: int | None = frames.default if frames is not None else None
        return found

    def output_pixels(self, request: Generate) -> int:
        """Pixels of one output, all frames together; 0 when the size follows from an image or is unknown."""
        unsized = request.images and (request.width is None or request.height is None)
        if unsized or (self.text is None and self.image is None):
            return 0
        sizes = self.main.sizes
        width, height = request.width or sizes.width, request.height or sizes.height
        return output_pixels(width, height, request.num_frames or self.default_num_frames, default=0)

    def info(self) -> ModelInfo:
        task = self.main
        return ModelInfo(
            model=self.name,
            path=self.path,
            pipeline=type(task.pipeline).__name__,
            kind=task.kind,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            parameters={
                name: count_parameters(module, self.layouts.get(name))
                for name, module in modules(self.pipeline).items()
            },
            arguments=task.arguments,
            size_multiple=task.sizes.multiple,
            default_width=task.sizes.width,
            default_height=task.sizes.height,
            default_num_frames=self.default_num_frames,
            default_fps=None if task.kind == "image" else self.frame_rate(task),
            deterministic_defaults=task.deterministic_defaults,
            supports_preview=task.supports_preview,
            takes_text_alone=self.text is not None,
            image_task=_image_task(self.image),
            no_image=self.no_image if self.image is None else None,
            no_rollout=why_no_rollouts(self.pipeline),
            batching=task.batching,
            attention=self.attention,
            weight_version=self.weight_version,
            quantized=self.quantized,
            offloaded={} if self.offload is None else self.offload.sizes,
            divided=self.divided,
            gpus=[str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())],
        )


def _image_task(task: PipelineTask | None) -> ImageTask | None:
    if task is None:
        return None
    return ImageTask(
        pipeline=type(task.pipeline).__name__,
        arguments=task.arguments,
        size_multiple=task.sizes.multiple,
        image_arguments=task.image_arguments,
        several_images=task.several_images,
        supports_preview=task.supports_preview,
        batching=task.batching,
        deterministic_defaults=task.deterministic_defaults,
    )


def load_model(
    config: Config, device: torch.device | None = None, ranks: Ranks = ALONE, sequence: Ranks = ALONE
) -> Model:
    """Load the configured pipeline, or this rank's shard, onto ``device`` (by default :func:`find_device`'s).

    The ranks of ``sequence`` have the same weights and share the denoisers' tokens. Raises ``StartFailed`` with one
    sentence for the operator when the checkpoint cannot be loaded.
    """
    device = device or find_device(config)
    path = str(resolve_model(config.model))
    directory, dtype, loaded, split = _load_pipeline(path, config, device, ranks, sequence)
    pipeline = loaded.pipeline
    quantized = _quantize(loaded, config, directory, dtype, ranks) if config.quantize else {}
    if config.offload == "off":
        pipeline.to(device)
    give_own_pages(modules(pipeline).values())
    disable_kv_caches(pipeline)
    model_defaults = read_model_defaults(directory, type(pipeline))
    return Model(
        name=config.served_model_name or config.model.rstrip("/").rsplit("/", 1)[-1],
        path=path,
        directory=directory,
        pipeline=pipeline,
        device=device,
        dtype=dtype,
        layouts=loaded.layouts,
        quantized=quantized,
        divided=_describe_division(loaded, ranks, split, sequence),
        model_defaults=model_defaults,
        text=new_task(pipeline, config, model_defaults.defaults),
        timing=Timing(device, config.max_batch, config.merge_gain),
    )


def _describe_division(loaded: LoadedPipeline, ranks: Ranks, split: Sequence[str], sequence: Ranks) -> dict[str, str]:
    """How the ranks share each component, in words; empty for a single rank."""
    words = {}
    if ranks.size > 1:
        words = {name: _describe_component(whole, ranks.size) for name, whole in loaded.whole.items()}
    for name in split:
        shared = f"its tokens are divided among {sequence.size} ranks"
        words[name] = f"{words[name]}; {shared}" if name in words else shared
    for name, division in words.items() if ranks.rank == sequence.rank == 0 else ():
        log.info("%s: %s", name, division)
    return words


def _describe_component(whole: Mapping[str, str], size: int) -> str:
    if "" in whole:
        return f"whole on every rank: {whole['']}"
    if not whole:
        return f"divided among {size} ranks"
    parts = ", ".join(f"{part} ({reason})" for part, reason in whole.items())
    return f"divided among {size} ranks, but for parts that {size} does not divide: every rank has {parts} whole"


def _load_pipeline(
    path: str, config: Config, device: torch.device, ranks: Ranks, sequence: Ranks
) -> tuple[Path, torch.dtype, LoadedPipeline, list[str]]:
    try:
        directory, dtype, single_file = _find(path, config, device)
        loaded = load_pipeline(
            directory,
            dtype,
            torch.device("cpu") if config.quantize or config.offload != "off" else device,
            ranks,
            fused=config.fuse_projections,
            variant=config.variant,
            single_file=single_file,
        )
        return directory, dtype, loaded, split_denoisers(loaded.pipeline, ranks.size, sequence)
    except StartFailed:
        raise
    except CannotLoad as error:
        raise StartFailed(f"The model {path} could not be loaded: {error}.") from error
    except Exception as error:  # the libraries raise any class; each ends this start with the library's message
        raise _cannot_load(path, error) from error


def _quantize(
    loaded: LoadedPipeline, config: Config, directory: Path, dtype: torch.dtype, ranks: Ranks
) -> dict[str, Quantized]:
    if Path(str(resolve_model(config.model))).is_file():
        raise StartFailed("--quantize needs a model that is a directory; a checkpoint in one file is not supported.")
    return quantize_pipeline(
        loaded,
        modules(loaded.pipeline),
        config.quantize,
        directory,
        variant=config.variant,
        dtype=dtype,
        ranks=ranks.size,
    )


def _find(path: str, config: Config, device: torch.device) -> tuple[Path, torch.dtype, SingleFile | None]:
    """The pipeline's directory, the weights' dtype, and the single file, for which the directory is its base."""
    if not Path(path).is_file():
        directory = find_directory(path, variant=config.variant, revision=config.revision)
        return directory, choose_dtype(config, device, lambda: stored_dtype(directory, config.variant)), None
    file = Path(path)
    dtype = choose_dtype(config, device, lambda: most_common_dtype([file]) if file.suffix == SAFETENSORS else None)
    single_file = open_single_file(file, config.base_pipeline, config.revision)
    return single_file.base, dtype, single_file


def find_directory(path: str, *, variant: str | None = None, revision: str | None = None) -> Path:
    """The pipeline's directory, downloaded first if ``path`` is a hub id. Raises ``StartFailed``."""
    if Path(path).exists():
        check_directory(Path(path))
        return Path(path)
    return download_pipeline(path, variant=variant, revision=revision)


def _cannot_load(path: str, error: Exception) -> StartFailed:
    log.error("loading %s failed", path, exc_info=error)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return StartFailed(
        f"The model {path} could not be loaded as a diffusers pipeline ({type(error).__name__}: {reason}); "
        "check that `DiffusionPipeline.from_pretrained` loads it from safetensors files."
    )
