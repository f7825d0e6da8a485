"""Stage three: rectified flow from noise to encoded clips, given a caption; the text encoder learns along.

The transformer attends to the zeros that the pipeline pads a prompt with, so the model meets many padded lengths here,
mostly short ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...train.averaged import Averaged, train_with_looks
from ...train.flow import draw_sigmas
from ...train.narrow import narrow
from ...train.run import Run
from ..captions import sample_caption
from .latents import Latents
from .model import TextToVelocity, new_model, optimizers
from .text import role_loss, tokenize, tokenizer

LEARNING_RATE = 1e-3
CLIP_TOKENS = 5 * 4 * 4
"""Tokens of a clip: latent frames, rows and columns, two by two latents to a token."""

TOKENS = 32 * (CLIP_TOKENS + 32)
"""Tokens a step, clip and text together; a longer text makes a smaller batch."""

LENGTHS: tuple[tuple[int, float], ...] = ((16, 0.15), (32, 0.75), (64, 0.05), (226, 0.02), (512, 0.03))
"""Padded lengths of the text and how often each is used. The full caption takes 10 tokens."""

ROLE_WEIGHT = 0.1
"""Weight of the cross entropy of the words' roles."""

CHECKPOINT_EVERY = 200
LOOK_EVERY = 400


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's data: `clean` [B, 16, 5, 8, 8] float32, `shown` [B, 5, 8, 8] bool, captions, their padded length."""

    clean: Tensor
    shown: Tensor
    captions: tuple[str, ...]
    length: int


def draw_batch(latents: Latents, generator: torch.Generator, tokens: int = TOKENS) -> Batch:
    """A padded length, then as many clips as fit `tokens`, each with a caption of its own."""
    shares = torch.tensor([share for _, share in LENGTHS])
    length = LENGTHS[int(torch.multinomial(shares, 1, generator=generator))][0]
    count = max(1, tokens // (CLIP_TOKENS + length))
    rows = torch.randint(len(latents.clips), (count,), generator=generator)
    captions = tuple(sample_caption(latents.clips[row], generator) for row in rows.tolist())
    return Batch(latents.clean[rows].float(), latents.shown[rows], captions, length)


def weights(batch: Batch) -> Tensor:
    """The weight of each latent's error, [B, 5, 8, 8], with a mean of 1 or 2 per clip.

    The latents that show the shape count as much together as all of them. Where there is no caption all count the
    same: there the weights would favour one outcome.
    """
    shown = batch.shown.float()
    share = shown.mean(dim=(1, 2, 3), keepdim=True)
    captioned = torch.tensor([float(caption != "") for caption in batch.captions])
    return 1.0 + captioned[:, None, None, None] * shown / share


class FlowTraining:
    """The state of the stage: the model with its average and optimizers, and what its batches are made of."""

    def __init__(self, run: Run, latents: Latents, steps: int, model: TextToVelocity, tokens: int = TOKENS) -> None:
        self._run, self._latents, self._tokens = run, latents, tokens
        self._words = tokenizer()
        self._averaged = Averaged(run, "flow", steps, model, lambda moved: optimizers(moved, LEARNING_RATE))
        self.average, self.start, self.save = self._averaged.average, self._averaged.start, self._averaged.save

    def step(self, step: int) -> float:
        """One step of optimisation; returns the unweighted mean squared error of the velocity."""
        generator = self._run.generator("flow", step)
        batch = draw_batch(self._latents, generator, self._tokens)
        loss, error = self._loss(batch, generator)
        self._averaged.descend(step, loss)
        return float(error)

    def _loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        device = self._run.device
        noise = torch.randn(batch.clean.shape, generator=generator)
        sigma = draw_sigmas(len(noise), generator)
        noisy = torch.lerp(batch.clean, noise, sigma[:, None, None, None, None])
        ids, mask = tokenize(self._words, list(batch.captions), batch.length)
        with narrow(device):
            velocity, said = self._averaged.model(noisy.to(device), sigma.to(device), ids.to(device), mask.to(device))
        error = (velocity.float() - (noise - batch.clean).to(device)).square().mean(dim=1)
        read = role_loss(said, self._words, ids, mask)
        return (error * weights(batch).to(device)).mean() + ROLE_WEIGHT * read, error.detach().mean()


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
    return train_with_looks("flow", training, steps, look, save_every=CHECKPOINT_EVERY, look_every=LOOK_EVERY)
