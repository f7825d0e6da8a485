"""Random weights that are the same each time and leave no layer silent."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline

VECTOR_NOISE = 0.05
"""Standard deviation of what is added to biases, norm scales and other one-dimensional parameters."""

DENOISERS = ("transformer", "transformer_2", "unet")
"""Names of the components whose matrices get `DENOISER_GAIN`."""

DENOISER_GAIN = 1.5
"""With unit gain a few tokens of the prompt hardly show in the pictures of some families."""


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed torch inside the block and leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def randomise(module: torch.nn.Module, generator: torch.Generator, gain: float = 1.0) -> None:
    """Overwrite all parameters with noise, in the order of their names.

    Matrices, kernels and embeddings get a standard deviation of gain / sqrt(fan in), so layers that the library
    initialises to zero (or not at all) pass signal; vectors keep their value and get a little noise.
    """
    for _, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            fan_in = parameter[0].numel()
            parameter.copy_(noise * gain * fan_in**-0.5)
        else:
            parameter.copy_(parameter.nan_to_num() + VECTOR_NOISE * noise)


def ready(pipeline: DiffusionPipeline, seed: int = 0) -> DiffusionPipeline:
    """Randomise every module of the pipeline, put it in evaluation mode and silence its progress bar."""
    generator = torch.Generator().manual_seed(seed)
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            randomise(component, generator, gain=DENOISER_GAIN if name in DENOISERS else 1.0)
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
