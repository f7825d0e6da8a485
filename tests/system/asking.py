"""Requests to a live server, and what plain diffusers gives for the same ones."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load

from safelight.tests.tiny import FAMILIES

FIELDS = ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "true_cfg_scale", "negative_prompt")
PROMPTS = ("a red circle", "two blue squares on a white table", "a star", "a red circle", "one heart", "a green cross")


def body(family: str, index: int = 0, **changes: Any) -> dict[str, Any]:
    """Request ``index`` of a mixed load, answered as an exact tensor: prompt, seed and steps differ."""
    call = dict(FAMILIES[family].call) | {"num_inference_steps": 2 + index % 2}
    asked: dict[str, Any] = {name: value for name, value in call.items() if name in FIELDS}
    # JSON types are checked: an empty list where the call has none, which switches off Sana's instruction just as well
    asked["extra"] = {name: [] if value is None else value for name, value in call.items() if name not in FIELDS}
    return asked | {"prompt": PROMPTS[index], "seed": 100 + index, "output_format": "pt"} | changes


def picture(answer: dict[str, Any], output: int = 0) -> torch.Tensor:
    """An output's tensor: float in [0, 1], [C, H, W] or [F, C, H, W]."""
    return load(base64.b64decode(answer["outputs"][output]["b64"]))["t"]


def plain(pipeline: DiffusionPipeline, asked: dict[str, Any]) -> torch.Tensor:
    """The unmodified pipeline's result for the body ``asked``."""
    given = {name: asked[name] for name in FIELDS if name in asked} | asked["extra"]
    generator = torch.Generator("cpu").manual_seed(asked["seed"])
    output = pipeline(prompt=asked["prompt"], generator=generator, output_type="pt", **given)
    found: torch.Tensor = next(output[name] for name in ("images", "frames") if name in output)[0]
    return found


def load_plain(directory: Path) -> DiffusionPipeline:
    """The checkpoint as any user of diffusers loads it."""
    pipeline = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry ``labels``."""
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(name)]
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))


def ask(url: str, asked: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The JSON of a 200. Raises ``AssertionError`` with the body of any other answer."""
    answer = httpx.post(f"{url}/generate", json=asked, timeout=60, **options)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ask_together(url: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """All at once, each over a connection of its own."""

    async def gather() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as session:
            return await asyncio.gather(*(session.post(f"{url}/generate", json=asked) for asked in bodies))

    return asyncio.run(gather())


def stats(url: str) -> dict[str, int]:
    """The first replica's counters."""
    found: dict[str, int] = httpx.get(f"{url}/server_info").json()["replicas"][0]["stats"]
    return found
