"""`python -m safelight.shapes.motion.train`: the clips checkpoint from a seed, resuming where it stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from ...train.run import Run
from . import flow, vae
from .export import export, pipeline
from .latents import Latents, encode_clips
from .look import look
from .model import TextToVelocity, new_model
from .refine import refine, sharpen
from .text import tokenizer
from .words import teach

STAGES = ("vae", "latents", "flow", "export", "all")
VAE_STEPS, REFINE_STEPS, DECODER_STEPS, FLOW_STEPS, EACH = 2400, 1800, 1000, 5800, 2


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m safelight.shapes.motion.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, sample sheets and the export")
    parser.add_argument("--stage", choices=STAGES, default="all", help="run up to this stage (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--refine-steps", type=int, default=REFINE_STEPS)
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS)
    parser.add_argument("--steps", type=int, default=FLOW_STEPS, help="steps of the flow stage")
    parser.add_argument("--each", type=int, default=EACH, help="times that every clip is encoded for the flow stage")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the exported weights")
    return parser


def main() -> None:
    options = arguments().parse_args()
    run = Run(options.out, torch.device(options.device), options.seed)
    autoencoder = refine(run, vae.train(run, options.vae_steps), options.refine_steps)
    autoencoder = sharpen(run, autoencoder, options.decoder_steps)
    if options.stage == "vae":
        return
    latents = encode_clips(run, autoencoder, options.each)
    if options.stage == "latents":
        return
    model = train_flow(run, autoencoder, latents, options.steps, options.compile)
    if options.stage != "flow":
        export(autoencoder, model, latents, run.out / "shapes-video", getattr(torch, options.dtype))


def train_flow(run: Run, autoencoder: AutoencoderKLWan, latents: Latents, steps: int, compiled: bool) -> TextToVelocity:
    """The flow stage, with a sheet of samples for each look at the moving average."""

    def seen(average: TextToVelocity, step: int) -> str:
        line = look(pipeline(autoencoder, average, latents), run.out / "sheets" / f"flow_{step:06d}.png")
        return f"flow {step}: {line}"

    model = new_model(run.seed)
    if not run.checkpoint("flow").exists():
        teach(model, tokenizer(), run.seed)
    if compiled:
        model.transformer.compile_repeated_blocks()
    return flow.train(run, latents, steps, seen, model)


if __name__ == "__main__":
    main()
