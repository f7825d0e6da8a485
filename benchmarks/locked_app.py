"""The app that most people write first: FastAPI around one pipeline, with a lock.

It is what Safelight is measured against, so it is written as well as such an app can be: the pipeline runs in a thread,
the lock is held for the pipeline alone, and the PNG is encoded outside it.
"""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI, Response

app = FastAPI()
lock = threading.Lock()
pipeline: Any = None
arguments: dict[str, Any] = {}


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/generate")
def generate(body: dict[str, Any]) -> Response:
    generator = torch.Generator("cpu").manual_seed(body["seed"])
    given = {"num_inference_steps": body["num_inference_steps"], **arguments}
    with lock, torch.no_grad():
        picture = pipeline(body["prompt"], generator=generator, **given).images[0]
    file = io.BytesIO()
    picture.save(file, format="png", compress_level=3)
    return Response(file.getvalue(), media_type="image/png")


if __name__ == "__main__":
    model, dtype, port, side, text_length, threads = *sys.argv[1:3], *map(int, sys.argv[3:7])
    torch.set_num_threads(threads)
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"width": side, "height": side, "max_sequence_length": text_length}
    uvicorn.run(app, port=port, log_level="warning")
