"""The model that a replica serves: its pipeline, loaded, and what can be asked of it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from ..formats.checkpoint import SAFETENSORS, check_directory
from ..formats.model_names import resolve_model
from ..protocol.config import Config
from ..protocol.costs import output_pixels
from ..protocol.errors import InvalidRequest, StartFailed
from ..protocol.generation import Generate
from ..protocol.replicas import BatchingMode, ImageTask, ModelInfo
from .forward.costs import Costs
from .frame_rate import frame_rate
from .internals.torch import is_in_bad_fork
from .model_defaults import ModelDefaults, read_model_defaults
from .parallel.ranks import ALONE, Ranks
from .pipeline_task import PipelineTask, new_task
from .rollout.sampling import why_no_rollouts
from .sizes import DENOISERS
from .weights.checkpoint.components import components
from .weights.checkpoint.download import download_pipeline
from .weights.checkpoint.files import WeightFiles
from .weights.checkpoint.layout import Layout
from .weights.checkpoint.loader import CannotLoad
from .weights.checkpoint.pipeline import LoadedPipeline, load_pipeline
from .weights.checkpoint.single_file import SingleFile, open_single_file
from .weights.update.page_swap import give_own_pages

log = logging.getLogger(__name__)

INITIAL_VERSION = "0"
"""The weight version of a checkpoint as it was loaded."""


@dataclass(slots=True)
class Model:
    """A loaded pipeline with what it does: ``text`` from a prompt alone, ``image`` from a prompt and images.

    The self-test decides which of the two there are, and ``no_image`` says why the second is not there. ``layouts``
    are of every component with weights; ``model_defaults`` is what the checkpoint says of itself.
    """

    name: str
    path: str
    directory: Path
    """Where its files lie; of a single file, those of its base."""
    pipeline: DiffusionPipeline
    device: torch.device
    dtype: torch.dtype
    layouts: dict[str, Layout]
    divided: dict[str, str]
    model_defaults: ModelDefaults
    text: PipelineTask | None
    image: PipelineTask | None = None
    no_image: str = "it was not tried"
    weight_version: str = INITIAL_VERSION
    costs: Costs = field(init=False)
    """How long calls to its components take."""

    def __post_init__(self) -> None:
        self.costs = Costs(self.device)

    @property
    def main(self) -> PipelineTask:
        """What is done for a request that brings no more than it must."""
        task = self.text or self.image
        assert task is not None, "a model does something"
        return task

    def task(self, request: Generate) -> PipelineTask:
        """What is done for ``request``. Raises ``InvalidRequest`` where the model does no such thing."""
        task = self.image if request.images else self.text
        if task is None:
            raise InvalidRequest(f"this model takes {'no image' if request.images else 'an image'}", field="image")
        return task

    def batching_mode(self, request: Generate) -> BatchingMode:
        """How ``request`` shares the components with others, as far as its task is concerned."""
        task = self.image if request.images else self.text
        return "merged" if task is None else task.batching.mode

    def frame_rate(self, task: PipelineTask) -> int:
        """Frames a second of a clip, where a request says nothing of it."""
        return self.model_defaults.fps or frame_rate(type(task.pipeline), task.arguments, task.defaults)

    def is_finite(self) -> bool:
        """Whether every parameter of this rank is."""
        return all(bool(parameter.isfinite().all()) for parameter in _parameters(self.pipeline))

    @property
    def default_num_frames(self) -> int | None:
        frames = self.main.arguments.get("num_frames")
        found: int | None = frames.default if frames is not None else None
        return found

    def output_pixels(self, request: Generate) -> int:
        """Of one output, all frames together; 0 where it follows from an image, or is not known."""
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
            weight_version=self.weight_version,
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


def load_model(config: Config, device: torch.device | None = None, ranks: Ranks = ALONE) -> Model:
    """Load the configured pipeline, or this rank's part of it, onto ``device`` (:func:`find_device`'s by default).

    Raises ``StartFailed`` with one sentence for the operator when the checkpoint cannot be loaded.
    """
    device = device or find_device(config)
    path = str(resolve_model(config.model))
    directory, dtype, loaded = _load_pipeline(path, config, device, ranks)
    pipeline = loaded.pipeline
    give_own_pages(modules(pipeline).values())
    _forget_caches(pipeline)
    model_defaults = read_model_defaults(directory, type(pipeline))
    return Model(
        name=config.served_model_name or config.model.rstrip("/").rsplit("/", 1)[-1],
        path=path,
        directory=directory,
        pipeline=pipeline,
        device=device,
        dtype=dtype,
        layouts=loaded.layouts,
        divided=_say_divided(loaded, ranks),
        model_defaults=model_defaults,
        text=new_task(pipeline, config, model_defaults.defaults),
    )


def _say_divided(loaded: LoadedPipeline, ranks: Ranks) -> dict[str, str]:
    """How the ranks share each component, in words; nothing of a rank that is alone."""
    if ranks.size == 1:
        return {}
    found = {name: _say_shared(whole, ranks.size) for name, whole in loaded.whole.items()}
    for name, words in found.items() if ranks.rank == 0 else ():
        log.info("%s is %s", name, words)
    return found


def _say_shared(whole: Mapping[str, str], size: int) -> str:
    if "" in whole:
        return f"whole on every rank: {whole['']}"
    if not whole:
        return f"divided among {size} ranks"
    parts = ", ".join(f"{part} ({reason})" for part, reason in whole.items())
    return f"divided among {size} ranks, but for parts that {size} does not divide: every rank has {parts} whole"


def _load_pipeline(
    path: str, config: Config, device: torch.device, ranks: Ranks
) -> tuple[Path, torch.dtype, LoadedPipeline]:
    try:
        directory, dtype, single_file = _find(path, config, device)
        loaded = load_pipeline(
            directory,
            dtype,
            device,
            ranks,
            fused=config.fuse_projections,
            variant=config.variant,
            single_file=single_file,
        )
        return directory, dtype, loaded
    except StartFailed:
        raise
    except CannotLoad as error:
        raise StartFailed(f"The model {path} could not be loaded: {error}.") from error
    except Exception as error:  # the libraries raise errors of every kind; each ends this start, with its own words
        raise _cannot_load(path, error) from error


def _find(path: str, config: Config, device: torch.device) -> tuple[Path, torch.dtype, SingleFile | None]:
    """The pipeline's directory, the weights' dtype, and the single file whose base the directory is, if it is one."""
    if not Path(path).is_file():
        directory = find_directory(path, variant=config.variant, revision=config.revision)
        return directory, _dtype(config, device, lambda: stored_dtype(directory, config.variant)), None
    file = Path(path)
    dtype = _dtype(config, device, lambda: _most_common_dtype([file]) if file.suffix == SAFETENSORS else None)
    single_file = open_single_file(file, config.base_pipeline, config.revision)
    return single_file.base, dtype, single_file


def find_directory(path: str, *, variant: str | None = None, revision: str | None = None) -> Path:
    """The directory of the pipeline, downloaded first where ``path`` is a hub id. Raises ``StartFailed``."""
    if Path(path).exists():
        check_directory(Path(path))
        return Path(path)
    return download_pipeline(path, variant=variant, revision=revision)


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
    if is_in_bad_fork():
        raise StartFailed("CUDA was opened before this worker was forked, and cannot be used in it; add --no-nursery.")
    if config.tp > torch.cuda.device_count():
        raise StartFailed(f"--tp {config.tp} needs a GPU for each rank, and there are {torch.cuda.device_count()}.")
    return torch.device("cuda", (replica * config.tp + rank) % torch.cuda.device_count())


def use_device(device: torch.device) -> None:
    """Make ``device`` the calling thread's own: kernels that are not torch's operators run on no other."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _dtype(config: Config, device: torch.device, stored: Callable[[], str | None]) -> torch.dtype:
    if config.dtype != "auto":
        found: torch.dtype = getattr(torch, config.dtype)
        return found
    if device.type == "cuda" or (_multiplies_bfloat16() and stored() == "BF16"):
        return torch.bfloat16
    return torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers (AVX-512 BF16, AMX, or Arm's)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def stored_dtype(directory: Path, variant: str | None = None) -> str | None:
    """The dtype, as safetensors names it, of most parameters in the denoiser's first file; ``None`` without a file.

    Of a checkpoint with variants ("…model.fp16.safetensors") that is the file that is loaded.
    """
    for name, component in components(directory, variant).items():
        if name in DENOISERS and component.is_model and (files := component.files):
            return _most_common_dtype(files[:1])
    return None


def _most_common_dtype(files: Sequence[Path]) -> str:
    sizes = Counter[str]()
    with WeightFiles(files) as opened:
        for name in opened:
            sizes[opened[name].get_dtype()] += math.prod(opened[name].get_shape())
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
    for module in modules(pipeline).values():
        yield from module.parameters()


def modules(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's components that are modules, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def count_parameters(module: nn.Module, layout: Layout | None) -> int:
    """Of all ranks together: of what is divided among them, a rank has only its part."""
    whole = Counter[str]()
    for entry in layout or ():
        whole[entry.tensor] += math.prod(entry.shape)
    return sum(whole.get(name) or one.numel() for name, one in module.named_parameters())
