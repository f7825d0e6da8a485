"""Stage three: rectified flow from noise to encoded scenes, given a caption; text encoders learn along.

The pipeline pads T5's input without masking it, so the model meets many padded lengths here, mostly short ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from ..captions import Caption, sample_caption
from .averaged import Averaged, train_with_looks
from .latents import Latents
from .model import TextToVelocity, new_model, optimizers
from .narrow import narrow
from .run import Run
from .text import TEXT_TOKENS, clip_tokenizer, t5_tokenizer

LEARNING_RATE = 1e-3
TOKENS = 48 * (64 + 16)
"""Tokens a step, image and text together; a longer text makes a smaller batch."""

LENGTHS: tuple[tuple[int, float], ...] = ((16, 0.68), (32, 0.26), (64, 0.03), (128, 0.02), (512, 0.01))
"""Padded lengths of T5's input and how often each is used. The full caption takes 13 tokens."""

CHECKPOINT_EVERY = 200


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's data: `clean` [B, 64, 64] float32, `shown` [B, 64] bool, the captions and their padded length."""

    clean: Tensor
    shown: Tensor
    captions: tuple[Caption, ...]
    length: int


def draw_batch(latents: Latents, generator: torch.Generator, tokens: int = TOKENS) -> Batch:
    """A padded length, then as many scenes as fit `tokens`, each with a caption of its own."""
    shares = torch.tensor([share for _, share in LENGTHS])
    length = LENGTHS[int(torch.multinomial(shares, 1, generator=generator))][0]
    count = max(1, tokens // (latents.tokens.shape[1] + length))
    rows = torch.randint(len(latents.scenes), (count,), generator=generator)
    captions = tuple(sample_caption(latents.scenes[row], generator) for row in rows.tolist())
    return Batch(latents.tokens[rows].float(), latents.shown[rows], captions, length)


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [count] in (0, 1), logit-normal (Esser et al., 2024) around two centres.

    Three directions of a token's 64 hold nine tenths of its variance: its colour. So layout is decided where little
    of the picture is left, between 0.7 and 1, and outlines below; two thirds of the draws go to the first.
    """
    layout = torch.rand(count, generator=generator) < 2 / 3
    normal = torch.randn(count, generator=generator)
    return torch.sigmoid(torch.where(layout, 2.0 + normal, 0.2 + 1.1 * normal))


def weights(batch: Batch) -> Tensor:
    """The weight of each token's error, [B, 64], with a mean of about 1 to 2 per picture.

    The tokens that show the shape count as much together as all tokens together, however small the shape. Where
    the caption leaves place or size open all tokens count the same: there the weights would favour one outcome.
    """
    shown = batch.shown.float()
    share = shown.mean(dim=1, keepdim=True).clamp(min=1 / shown.shape[1])
    placed = torch.tensor([float(caption.places) for caption in batch.captions])
    return 1.0 + placed[:, None] * shown / share


def tokenize(clip: CLIPTokenizer, t5: T5Tokenizer, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids for CLIP [B, 32] and for T5 [B, length], padded as `FluxPipeline` pads them."""
    clip_ids = clip(texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    t5_ids = t5(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return clip_ids.input_ids, t5_ids.input_ids


class FlowTraining:
    """The state of the stage: the model with its average and optimizers, and what its batches are made of."""

    def __init__(self, run: Run, latents: Latents, steps: int, model: TextToVelocity, tokens: int = TOKENS) -> None:
        self._run, self._latents, self._tokens = run, latents, tokens
        self._clip, self._t5 = clip_tokenizer(), t5_tokenizer()
        self._averaged = Averaged(run, "flow", steps, model, lambda moved: optimizers(moved, LEARNING_RATE))
        self.average, self.start, self.save = self._averaged.average, self._averaged.start, self._averaged.save

    def step(self, step: int) -> float:
        """One step of optimisation; returns the unweighted mean squared error of the velocity."""
        generator = self._run.generator("flow", step)
        batch = draw_batch(self._latents, generator, self._tokens)
        ids = tokenize(self._clip, self._t5, [caption.text for caption in batch.captions], batch.length)
        loss, error = flow_loss(self._averaged.model, batch, ids, generator, self._run.device)
        self._averaged.descend(step, loss)
        return float(error)


def flow_loss(
    model: TextToVelocity, batch: Batch, ids: tuple[Tensor, Tensor], generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The weighted squared error of the velocity at noise levels of the generator's, and the plain mean of it."""
    noise = torch.randn(batch.clean.shape, generator=generator)
    sigma = draw_sigmas(len(noise), generator)
    noisy = torch.lerp(batch.clean, noise, sigma[:, None, None])
    clip_ids, t5_ids = (part.to(device) for part in ids)
    with narrow(device):
        velocity = model(noisy.to(device), sigma.to(device), clip_ids, t5_ids)
    error = (velocity.float() - (noise - batch.clean).to(device)).square().mean(dim=2)
    return (error * weights(batch).to(device)).mean(), error.detach().mean()


def train(
    run: Run,
    latents: Latents,
    steps: int,
    look: Callable[[TextToVelocity, int], str],
    model: TextToVelocity | None = None,
    tokens: int = TOKENS,
) -> TextToVelocity:
    """Trains, or resumes, the model; returns its moving average. `look` is shown that average now and then."""
    training = FlowTraining(run, latents, steps, model or new_model(run.seed), tokens)
    return train_with_looks("flow", training, steps, look, save_every=CHECKPOINT_EVERY, look_every=CHECKPOINT_EVERY)
