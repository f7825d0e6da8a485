"""The cost of rollouts: groups of 16 from a server, compared with the pipeline in the trainer's own process.

``python -m safelight.benchmarks.rollout [--quick]`` draws groups of the embedded model, with trajectories and
environments: by the server over HTTP and with replies in shared memory; by diffusers' pipeline in this process, one
sample after the other and all in one batch, with no log-probabilities and nothing recorded. All are measured in turns,
in one run. Written to ``benchmarks/results/rollout.json`` and ``rollout.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from safelight.benchmarks.machine import describe
from safelight.benchmarks.serving import PROMPTS, SHAPES, SIDE, TEXT_LENGTH, measuring_options, safelight, serving
from safelight.client import Client

RESULTS = Path(__file__).resolve().parent / "results"
GROUP, STEPS = 16, 10


def main() -> None:
    options = measuring_options(__doc__)
    torch.set_num_threads(options.threads)
    command, port = safelight(SHAPES, options.dtype, options.threads)
    with serving(command, port) as url, Client(url) as client:
        found = {"machine": describe(), "options": vars(options)} | measure(client, options)
    print(table(found))
    if not options.quick:
        (RESULTS / "rollout.json").write_text(json.dumps(found, indent=2) + "\n")
        (RESULTS / "rollout.md").write_text(table(found))


def measure(client: Client, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each group, and what share of a call the server did not spend on drawing; the first is not counted."""
    pipeline = DiffusionPipeline.from_pretrained(SHAPES, torch_dtype=getattr(torch, options.dtype))
    pipeline.set_progress_bar_config(disable=True)
    seconds: dict[str, list[float]] = {}
    beside: dict[str, list[float]] = {}
    for number in range(1 if options.quick else options.rounds + 1):
        prompt = PROMPTS[number % len(PROMPTS)]
        for name, shared in (("http", False), ("shared memory", True)):
            took, drawing = roll_out(client, prompt, number, shared=shared)
            if number or options.quick:
                seconds.setdefault(name, []).append(took)
                beside.setdefault(name, []).append(1 - drawing / took)
        for name, draw in (("one by one", one_by_one), ("one batch", one_batch)):
            started = time.perf_counter()
            draw(pipeline, prompt, number)
            took = time.perf_counter() - started
            if number or options.quick:
                seconds.setdefault(name, []).append(took)
        print(f"round {number}: { ({name: round(values[-1], 2) for name, values in seconds.items()}) }", flush=True)
    rates = {name: GROUP / statistics.median(values) for name, values in seconds.items()}
    shares = {name: statistics.median(values) for name, values in beside.items()}
    return {"seconds": seconds, "samples_per_s": rates, "encoding_and_transport": shares}


def roll_out(client: Client, prompt: str, seed: int, *, shared: bool) -> tuple[float, float]:
    """Seconds of a call, and of it from the first sample's start to the last one's last pixel, at least."""
    started = time.perf_counter()
    rollouts = client.rollout(
        prompt,
        n=GROUP,
        seed=GROUP * seed,
        steps=STEPS,
        width=SIDE,
        height=SIDE,
        environment=True,
        shared_memory=shared,
        max_sequence_length=TEXT_LENGTH,
    )
    return time.perf_counter() - started, max(rollout.inference_time_s for rollout in rollouts)


def one_by_one(pipeline: Any, prompt: str, seed: int) -> None:
    for index in range(GROUP):
        _draw(pipeline, prompt, torch.Generator().manual_seed(GROUP * seed + index))


def one_batch(pipeline: Any, prompt: str, seed: int) -> None:
    generators = [torch.Generator().manual_seed(GROUP * seed + index) for index in range(GROUP)]
    _draw(pipeline, prompt, generators, num_images_per_prompt=GROUP)


def _draw(pipeline: Any, prompt: str, generator: Any, **more: Any) -> None:
    sizes = {"width": SIDE, "height": SIDE, "max_sequence_length": TEXT_LENGTH}
    pipeline(prompt, num_inference_steps=STEPS, generator=generator, output_type="pt", **sizes, **more)


def table(found: dict[str, Any]) -> str:
    rates, shares = found["samples_per_s"], found["encoding_and_transport"]
    rows = "".join(
        f"| {title} | {rates[name]:.2f} | {rates['http'] / rates[name]:.2f} | {share} |\n"
        for name, title, share in (
            ("http", "rollouts over HTTP", f"{100 * shares['http']:.1f} %"),
            ("shared memory", "rollouts, replies in shared memory", f"{100 * shares['shared memory']:.1f} %"),
            ("one by one", "diffusers in the trainer's process, one by one", ""),
            ("one batch", "diffusers in the trainer's process, one batch", ""),
        )
    )
    return f"""Machine: {json.dumps(found["machine"])}

Groups of {GROUP} samples of the embedded model, {STEPS} steps, {found["options"]["dtype"]}; rollouts with trajectories
and environments, the others with nothing recorded. Encoding and transport: of a call's time what is not drawing, wanted
at most 10 %.

| | samples/s | rollouts over HTTP are so many times as fast | encoding and transport |
|---|---|---|---|
{rows}"""


if __name__ == "__main__":
    main()
