"""The app that most people write first: FastAPI around one pipeline, with a lock.

The lock is held for the pipeline alone, and the PNG is encoded outside it. FastAPI runs each request in one of many
threads, and with each of them OpenMP gets a team of threads more, which makes all of them slower (decision 0006). Who
knows that runs the pipeline in a thread of its own: that is the app with ``one-thread``.
"""

from __future__ import annotations

import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI, Response

app = FastAPI()
lock = threading.Lock()
own_thread: ThreadPoolExecutor | None = None
pipeline: Any = None
arguments: dict[str, Any] = {}


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/generate")
def generate(body: dict[str, Any]) -> Response:
    generator = torch.Generator("cpu").manual_seed(body["seed"])
    given = {name: body[name] for name in ("num_inference_steps", "guidance_scale") if name in body} | arguments

    def draw() -> Any:
        with lock, torch.no_grad():
            return pipeline(body["prompt"], generator=generator, **given).images[0]

    picture = draw() if own_thread is None else own_thread.submit(draw).result()
    file = io.BytesIO()
    picture.save(file, format="png", compress_level=3)
    return Response(file.getvalue(), media_type="image/png")


if __name__ == "__main__":
    model, dtype, port, side, text_length, threads = *sys.argv[1:3], *map(int, sys.argv[3:7])
    torch.set_num_threads(threads)
    if sys.argv[7] == "one-thread":
        own_thread = ThreadPoolExecutor(1)
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"width": side, "height": side, "max_sequence_length": text_length}
    uvicorn.run(app, port=port, log_level="warning")
