"""The CPU time that a worker spends on a picture outside components: pipelines' own code and the runtime's.

``python -m safelight.benchmarks.overhead [--quick]`` draws pictures in this process as a worker does, in groups of 1
and 16, with components that give their first answer again and again. So nearly all of the time is the rest's, and two
versions can be compared even on a busy machine. Plain ``pipeline(...)`` calls with the same components, in batches of 1
and 16, show the pipeline's own share. Results: ``benchmarks/results/overhead.json`` and ``overhead.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safelight.benchmarks.machine import describe
from safelight.benchmarks.models import save_tiny_z_image
from safelight.benchmarks.serving import SHAPES, SIDE
from safelight.protocol.config import Config
from safelight.protocol.generation import Generate, Sample
from safelight.protocol.rollouts import Rollout
from safelight.worker.forward.activity import Activity
from safelight.worker.forward.at_rest import AtRest
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.lora.rank_adapters import RankAdapters
from safelight.worker.model.model import Model, load_model
from safelight.worker.model.modules import modules
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.requests.sample import SampleRun

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = 8
NUMBERS = count(1)


def load(path: Path) -> Model:
    """The model in bfloat16, whose components answer from memory; pictures are computed once for each batch size."""
    model = load_model(Config(model=str(path), dtype="bfloat16"))
    for module in modules(model.pipeline).values():
        _answer_from_memory(module, "forward")
        if hasattr(module, "decode"):
            _answer_from_memory(module, "decode")
    return model


def _answer_from_memory(module: nn.Module, method: str) -> None:
    known: dict[int, Any] = {}
    compute = getattr(module, method)

    def answer(*args: Any, **kwargs: Any) -> Any:
        primary = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor | list))
        if len(primary) not in known:
            known[len(primary)] = compute(*args, **kwargs)
        found = known[len(primary)]
        return tuple(map(_own_list, found)) if isinstance(found, tuple) else found

    answer.__wrapped__ = compute  # type: ignore[attr-defined]  # pipelines and rollouts read its signature
    setattr(module, method, answer)


def _own_list(part: Any) -> Any:
    return list(part) if isinstance(part, list) else part


def new_batcher(model: Model) -> Batcher:
    return Batcher(
        max_batch=16,
        max_tokens=1 << 30,
        resources=ForwardResources(
            cache=PromptCache(64 << 20),
            adapters=RankAdapters(
                model.pipeline, model.layouts, ALONE, model.device, max_adapters=8, max_bytes=1 << 30
            ),
            timing=model.timing,
            at_rest=AtRest(modules(model.pipeline)),
            activity=Activity(),
        ),
    )


def draw(model: Model, batcher: Batcher, group: int, rollout: Rollout | None) -> None:
    """``group`` requests at once, or one request for a group of rollouts."""
    ended: list[SampleRun] = []
    for samples in _samples(group, together=rollout is not None):
        sizes = {"width": SIDE, "height": SIDE, "num_inference_steps": STEPS, "guidance_scale": 0.0}
        request = Generate(request_id=str(next(NUMBERS)), samples=samples, rollout=rollout, **sizes)  # type: ignore[arg-type]
        for index in range(len(samples)):
            run = SampleRun(model, request, index, lambda run, step: None, ended.append)
            batcher.start(run.coroutine)
    while len(ended) < group:
        batcher.step()
    errors = [run.coroutine.error for run in ended if run.coroutine.error is not None]
    if errors:
        raise errors[0]


def _samples(group: int, *, together: bool) -> list[list[Sample]]:
    if together:
        prompt = f"a cat number {next(NUMBERS)}"
        return [[Sample(seed=seed, prompt=prompt) for seed in range(group)]]
    numbers = [next(NUMBERS) for _ in range(group)]
    return [[Sample(seed=number, prompt=f"a cat number {number}")] for number in numbers]


def draw_plainly(model: Model, batch: int) -> None:
    numbers = [next(NUMBERS) for _ in range(batch)]
    model.pipeline(
        [f"a cat number {number}" for number in numbers],
        generator=[torch.Generator().manual_seed(number) for number in numbers],
        width=SIDE,
        height=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=0.0,
        output_type="pt",
    )


def milliseconds(call: Callable[[], None], pictures: int, rounds: int) -> float:
    """The median CPU time of this thread for a picture; the first two rounds warm up."""
    seconds = []
    for _ in range(rounds + 2):
        began = time.thread_time()
        call()
        seconds.append(time.thread_time() - began)
    return 1e3 * statistics.median(seconds[2:]) / pictures


def measure(path: Path, rounds: int) -> dict[str, float]:
    model = load(path)
    model.pipeline.set_progress_bar_config(disable=True)
    recorded = Rollout(returns_trajectory=True, returns_environment=True)
    found = {}
    for group in (1, 16):
        many = rounds if group > 1 else 4 * rounds
        found[f"plain, {group}"] = milliseconds(lambda group=group: draw_plainly(model, group), group, many)  # type: ignore[misc]
        for name, rollout in (("requests", None), ("rollouts", recorded)):
            batcher = new_batcher(model)
            found[f"{name}, {group}"] = milliseconds(
                lambda group=group, batcher=batcher, rollout=rollout: draw(model, batcher, group, rollout),  # type: ignore[misc]
                group,
                many,
            )
    return found


def table(found: dict[str, Any]) -> str:
    columns = ("plain, 1", "requests, 1", "rollouts, 1", "plain, 16", "requests, 16", "rollouts, 16")
    rows = "".join(
        f"| {model} | " + " | ".join(f"{times[column]:.1f}" for column in columns) + " |\n"
        for model, times in found["milliseconds"].items()
    )
    return f"""Machine: {json.dumps(found["machine"])}

CPU milliseconds a picture of {STEPS} steps outside components, medians of {found["rounds"]} rounds. "Plain, 16" is one
pipeline call for 16 prompts; "requests, 16" are 16 requests at once; rollouts have trajectories and environments.

| model | {" | ".join(columns)} |
|---|{"---|" * len(columns)}
{rows}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, and nothing written: to see that it runs")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    z_image = save_tiny_z_image(Path(tempfile.gettempdir()) / "safelight-peers" / "Z-Image-Turbo")
    times = {"tiny Z-Image": measure(z_image, rounds), "embedded model": measure(SHAPES, rounds)}
    found = {"machine": describe(), "rounds": rounds, "milliseconds": times}
    print(table(found))
    if not options.quick:
        (RESULTS / "overhead.json").write_text(json.dumps(found, indent=2) + "\n")
        (RESULTS / "overhead.md").write_text(table(found))


if __name__ == "__main__":
    main()
