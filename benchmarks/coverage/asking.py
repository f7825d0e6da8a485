"""The requests that each pipeline gets: three that differ, and the same in plain diffusers' own words."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import torch
from diffusers import DiffusionPipeline
from PIL import Image as pillow

from safelight.protocol.codec import Buffer
from safelight.protocol.generation import Generate, Image, Sample
from safelight.worker.model.pipeline_task import PipelineTask
from safelight.worker.pipelines.image_variants import as_taken

from .build import particulars
from .catalogue import PICTURES, kind

PROMPTS = ("a red circle", "two small blue squares and a star on a white table", "a cat on the moon")
SIDES = {"image": 64, "video": 32}
FRAMES = 9
OTHER_PICTURES = ("mask_image", "control_mask", "image_reference")


def request(task: PipelineTask, pipeline: str, index: int) -> Generate:
    """Request ``index``: prompts, images, seeds and numbers of steps differ."""
    side = -(-SIDES[task.kind] // task.sizes.multiple) * task.sizes.multiple
    call = _usual(set(task.arguments), side, index) | particulars(pipeline).call
    own = {field.name for field in msgspec.structs.fields(Generate)}
    fields: dict[str, Any] = {name: value for name, value in call.items() if name in own}
    extra = {name: value for name, value in call.items() if name not in own}
    sample = Sample(PROMPTS[index], seed=100 + index)
    images = [
        _packed(picture(index + place, side))
        for place in range(len(task.image_arguments) if kind(pipeline).startswith("image") else 0)
    ]
    return Generate(request_id=str(index), samples=[sample], images=images, extra=extra, output_format="pt", **fields)


def directly(pipeline: DiffusionPipeline, name: str) -> dict[str, Any]:
    """Arguments of a plain call, with a picture for each argument that may take one."""
    takes = set(inspect.signature(type(pipeline).__call__).parameters)
    side = SIDES["video" if "num_frames" in takes else "image"]
    found = _usual(takes, side, 0) | particulars(name).call
    if "prompt" in takes:
        found["prompt"] = PROMPTS[0]
    if kind(name).startswith("image"):
        asked = takes & {*PICTURES, *OTHER_PICTURES}
        found |= {argument: as_taken(argument, picture(0, side)) for argument in sorted(asked)}
    return found | {"generator": torch.Generator().manual_seed(0), "output_type": "np"}


def _usual(takes: set[str], side: int, index: int) -> dict[str, Any]:
    usual = {"width": side, "height": side, "num_frames": FRAMES, "num_inference_steps": 2 + index % 2}
    usual |= {"strength": 0.75, "use_resolution_binning": False}
    return {name: value for name, value in usual.items() if name in takes}


def picture(seed: int, side: int) -> pillow.Image:
    """A square picture of coarse noise."""
    coarse = torch.randint(256, (4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return pillow.fromarray(coarse.numpy()).resize((side, side), pillow.Resampling.BICUBIC)


def _packed(made: pillow.Image) -> Image:
    return Image(made.width, made.height, Buffer(made.tobytes()))
