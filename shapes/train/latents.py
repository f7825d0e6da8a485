"""Stage two: encodes the training scenes once, so that the flow stage never runs the autoencoder."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor
from torch.nn import functional

from ..render import coverage, place
from ..scene import PICTURE, Scene, sample_scenes
from ..styles import render_styled
from .model import GRID
from .run import Report, Run, load, save

BATCH = 50


@dataclass(frozen=True, slots=True)
class Latents:
    """Encoded scenes: `tokens` [N, 64, 64] float16, normalised; `shown` [N, 64] bool, where the shape is."""

    scenes: tuple[Scene, ...]
    tokens: Tensor
    shown: Tensor
    shift: float
    scale: float


def encode_scenes(run: Run, vae: AutoencoderKL, count: int, styles: tuple[str, ...] = ()) -> Latents:
    """`count` jittered scenes through the autoencoder, kept in `latents.pt` under the run's folder.

    In `styles`, for an adapter of a model that exists already, they are normalised as its autoencoder says.
    """
    path = run.checkpoint("-".join(("latents", *styles)))
    stored = load(path, torch.device("cpu"))
    if stored is not None:
        scenes = tuple(Scene(*words) for words in stored["scenes"])
        return Latents(scenes, stored["tokens"], stored["shown"], stored["shift"], stored["scale"])
    latents = _encode(run, vae.eval(), tuple(sample_scenes(count, run.generator("scenes", 0))), styles)
    words = [astuple(scene) for scene in latents.scenes]
    state = {"tokens": latents.tokens, "shown": latents.shown, "shift": latents.shift, "scale": latents.scale}
    save(path, {"scenes": words, **state})
    return latents


def _encode(run: Run, vae: AutoencoderKL, scenes: tuple[Scene, ...], styles: tuple[str, ...]) -> Latents:
    encoded: list[Tensor] = []
    shown: list[Tensor] = []
    report = Report("latents", 0, -(-len(scenes) // BATCH))
    for step in report.steps():
        part = scenes[step * BATCH : (step + 1) * BATCH]
        pictures = render_styled(part, styles, run.generator("latents", step)).to(run.device) * 2 - 1
        encoded.append(encode(vae, pictures).cpu())
        mask = coverage([scene.shape for scene in part], place(part, run.generator("latents", step)))
        shown.append(functional.max_pool2d(mask, PICTURE // GRID).flatten(1) > 0)
        report.update(step)
    raw = torch.cat(encoded)
    if styles:
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    else:
        shift, scale = float(raw.mean()), 1.0 / float(raw.std())
    return Latents(scenes, pack((raw - shift) * scale).half(), torch.cat(shown), shift, scale)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures [B, 3, 128, 128] in [-1, 1] to the mean of their latents, [B, 16, 16, 16] float32."""
    mean: Tensor = vae.encode(pictures).latent_dist.mean
    return mean.float()


def pack(latents: Tensor) -> Tensor:
    """[B, 16, 16, 16] to image tokens [B, 64, 64], two by two latents to a token, as FLUX does."""
    batch, channels, height, width = latents.shape
    packed: Tensor = FluxPipeline._pack_latents(latents, batch, channels, height, width)
    return packed
