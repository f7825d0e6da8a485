"""`python -m safelight.shapes.train.lora`: adapters with which the embedded model draws in a style.

The captions are those of plain scenes, so the style is the adapter's and no prompt's; data, noise levels and loss are
those of the flow stage. Adapters that are trained in one run learn to be used together as well: now and then all are
on, and the scenes are in all their styles. Each is written as diffusers' own training scripts write it.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from ..styles import STYLES
from .descent import descend
from .flow import draw_batch, flow_loss, tokenize
from .latents import Latents, encode_scenes
from .model import TextToVelocity
from .run import Run

CHECKPOINT = Path(__file__).resolve().parents[2] / "assets" / "shapes"
"""The embedded model, which the adapters are for."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out")
MODULATION = ("norm.linear", "norm1.linear", "norm_out.linear")
TARGETS = ATTENTION + FEED_FORWARD + MODULATION
"""The linear layers that an adapter changes: those that image tokens pass through."""

LEARNING_RATE = 5e-3
STEPS, RANK, SCENES = 1900, 16, 3000
TOKENS = 16 * (64 + 16)
"""Tokens a step, as in the flow stage, and a third of them."""

CHECKPOINT_EVERY = 50

TURNS: Mapping[tuple[str, ...], int] = {("outlined",): 3}
"""How many steps of each round it takes, where that is not one: a thin stroke is harder to learn than stripes."""

StyledLatents = Mapping[tuple[str, ...], Latents]
"""Encoded scenes by their styles; the adapters of all these styles are active in a step on them."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m safelight.shapes.train.lora", description=__doc__)
    parser.add_argument("--style", choices=STYLES, nargs="+", required=True, help="one, or several that are to mix")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, and for a folder a style")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="default: the embedded model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--scenes", type=int, default=SCENES, help="scenes to encode, in each style")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    options = arguments().parse_args()
    run = Run(options.out, torch.device(options.device), options.seed)
    pipeline = FluxPipeline.from_pretrained(options.model).to(run.device)
    latents = {
        styles: encode_scenes(run, pipeline.vae, options.scenes, styles) for styles in together(tuple(options.style))
    }
    train(run, pipeline, latents, options.steps, options.rank)
    for style in options.style:
        save_adapter(pipeline, style, run.out / style)


def together(styles: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The active styles in turn: each alone, then all."""
    alone: list[tuple[str, ...]] = [(style,) for style in styles]
    return [*alone, styles] if len(styles) > 1 else alone


def train(
    run: Run, pipeline: FluxPipeline, latents: StyledLatents, steps: int, rank: int = RANK, tokens: int = TOKENS
) -> None:
    """Gives the transformer an adapter for each style and trains them, or resumes; other weights stay as they are."""
    adapters = add_adapters(pipeline, {style for styles in latents for style in styles}, rank, run.seed)
    model = TextToVelocity(pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    turns = [styles for styles in latents for _ in range(TURNS.get(styles, 1))]

    def loss(step: int) -> tuple[Tensor, Tensor]:
        generator = run.generator("lora", step)
        styles = turns[step % len(turns)]
        use(pipeline, styles)
        batch = draw_batch(latents[styles], generator, tokens)
        texts = [caption.text for caption in batch.captions]
        ids = tokenize(pipeline.tokenizer, pipeline.tokenizer_2, texts, batch.length)
        return flow_loss(model, batch, ids, generator, run.device)

    stage = "-".join(("lora", *max(turns, key=len)))
    descend(run, stage, adapters.to(run.device), steps, loss, rate=LEARNING_RATE, every=CHECKPOINT_EVERY, error="mse")


def add_adapters(pipeline: FluxPipeline, styles: Collection[str], rank: int, seed: int) -> nn.ParameterList:
    """New adapters in the transformer, which change nothing yet; all their parameters."""
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), init_lora_weights="gaussian")
    for style in sorted(styles):
        pipeline.transformer.add_adapter(config, style)
    return nn.ParameterList(weight for name, weight in pipeline.transformer.named_parameters() if "lora_" in name)


def use(pipeline: FluxPipeline, styles: Sequence[str]) -> None:
    """Turns these adapters on, at full strength, and the others off; only those that are on get gradients."""
    pipeline.transformer.set_adapters(list(styles), [1.0] * len(styles))


def save_adapter(pipeline: FluxPipeline, style: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes one adapter of the transformer as `pytorch_lora_weights.safetensors`; returns the file's path."""
    weights = get_peft_model_state_dict(pipeline.transformer, adapter_name=style)
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers={name: weight.to(dtype) for name, weight in weights.items()},
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config[style].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


if __name__ == "__main__":
    main()
