"""The cost of adapters: to activate one, to apply one dynamically in each step, and to serve many at once.

``python -m safelight.benchmarks.lora [--quick]`` serves a random model of about a second a picture, for the cost of a
step with a dynamic adapter against the same adapter merged into the weights, and for the time in which a loaded
adapter becomes active; and the embedded model under 16 clients, each with one of 8 adapters by request, against the
same load without any, and against changing the active one between requests. Both sides of a ratio are measured in
turns, in one run. Written to ``benchmarks/results/lora.json`` and ``lora.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from safelight.benchmarks.machine import describe
from safelight.benchmarks.models import save_mid_size
from safelight.benchmarks.serving import PROMPTS, SHAPES, measuring_options, safelight, serving
from safelight.client import Client

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ADAPTERS, CLIENTS, RANK = 8, 16, 16


def main() -> None:
    options = measuring_options(__doc__)
    rounds = 1 if options.quick else options.rounds
    found: dict[str, Any] = {"machine": describe(), "options": vars(options)}
    with tempfile.TemporaryDirectory() as folder:
        middle = save_mid_size(SHAPES, Path(tempfile.gettempdir()) / "safelight-mid-size")
        with served(middle, Path(folder) / "middle", options) as client:
            found["steps"] = measure_steps(client, rounds, steps=8)
            found["activation"] = measure_activation(client, rounds)
        with served(SHAPES, Path(folder) / "shapes", options) as client:
            found["clients"] = measure_clients(client, rounds, pictures=16 if options.quick else 48)
    print(table(found))
    if not options.quick:
        (RESULTS / "lora.json").write_text(json.dumps(found, indent=2) + "\n")
        (RESULTS / "lora.md").write_text(table(found))


@contextmanager
def served(model: Path, folder: Path, options: argparse.Namespace) -> Iterator[Client]:
    """A server with all adapters loaded, for requests that name them."""
    command, port = safelight(model, options.dtype, options.threads)
    with serving([*command, "--weights-roots", str(folder)], port) as url, Client(url) as client:
        for name in names():
            client.set_lora(name, write_adapter(model, folder / name), mode="request")
        yield client


def names() -> list[str]:
    return [f"adapter-{number}" for number in range(ADAPTERS)]


def write_adapter(model: Path, folder: Path) -> Path:
    """Random factors for every linear layer of the transformer's blocks."""
    transformer = FluxTransformer2DModel.from_pretrained(model / "transformer")
    tensors = {}
    for path, layer in transformer.named_modules():
        if type(layer) is nn.Linear and "blocks." in path:
            tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(RANK, layer.in_features) / layer.in_features**0.5
            tensors[f"transformer.{path}.lora_B.weight"] = 0.01 * torch.randn(layer.out_features, RANK)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


def measure_steps(client: Client, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of a step with one adapter, in every way, and with none; the first round is not counted."""

    def request() -> float:
        lora = [{"name": "adapter-0", "scale": 1.0}]
        return client.generate(PROMPTS[0], seed=1, steps=steps, lora=lora).timings.denoise_s / steps

    def active() -> float:
        return client.generate(PROMPTS[0], seed=1, steps=steps).timings.denoise_s / steps

    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        took = {"none": active()}
        for mode in ("merge", "dynamic"):
            client.set_lora("adapter-0", mode=mode)
            took[mode] = active()
        client.unmerge_lora()
        client.set_lora("adapter-0", strength=0.0, mode="dynamic")
        took["request"] = request()
        for name, value in took.items():
            if number:
                seconds.setdefault(name, []).append(value)
        print(f"round {number}: { ({name: round(value, 4) for name, value in took.items()}) }", flush=True)
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["merge"], strict=True))
        for name in ("none", "dynamic", "request")
    }
    return {"seconds": seconds, "of_merged": ratios, "wanted": {"dynamic": 1.15}}


def measure_activation(client: Client, rounds: int) -> dict[str, float]:
    """Median milliseconds from the call to its reply, for an adapter that is loaded."""

    def timed(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - began)

    took: dict[str, list[float]] = {"merge": [], "unmerge": [], "dynamic": []}
    for number in range(2 * rounds):
        name = names()[number % ADAPTERS]
        took["merge"].append(timed(lambda name=name: client.set_lora(name, mode="merge")))  # type: ignore[misc]
        took["unmerge"].append(timed(client.unmerge_lora))
        took["dynamic"].append(timed(lambda name=name: client.set_lora(name, mode="dynamic")))  # type: ignore[misc]
    client.set_lora("adapter-0", strength=0.0, mode="dynamic")
    return {name: statistics.median(values) for name, values in took.items()} | {"request": 0.0}


def measure_clients(client: Client, rounds: int, pictures: int) -> dict[str, Any]:
    """Pictures a second of 16 clients: without adapters, with 8 of them by request, and changing the active one."""

    def plain(number: int) -> None:
        client.generate(PROMPTS[number % len(PROMPTS)], seed=number, lora=[])

    def by_request(number: int) -> None:
        name = names()[number % ADAPTERS]
        client.generate(PROMPTS[number % len(PROMPTS)], seed=number, lora=[{"name": name}])

    def switching(number: int) -> None:
        client.set_lora(names()[number % ADAPTERS], mode="dynamic")
        client.generate(PROMPTS[number % len(PROMPTS)], seed=number)

    def rate(draw: Callable[[int], None], clients: int, pictures: int) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(draw, range(pictures)))
        return pictures / (time.perf_counter() - began)

    rates: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        took = {"none": rate(plain, CLIENTS, pictures), "request": rate(by_request, CLIENTS, pictures)}
        took["switching"] = rate(switching, 1, max(4, pictures // 4))  # in turns: who changes it needs it to himself
        for name, value in took.items():
            if number:
                rates.setdefault(name, []).append(value)
        print(f"round {number}: { ({name: round(value, 2) for name, value in took.items()}) } pictures/s", flush=True)
    return {
        "pictures_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "request_of_none": statistics.median(a / b for a, b in zip(rates["request"], rates["none"], strict=True)),
        "request_of_switching": statistics.median(
            a / b for a, b in zip(rates["request"], rates["switching"], strict=True)
        ),
        "wanted": {"request_of_none": 0.8},
    }


def table(found: dict[str, Any]) -> str:
    steps, clients, activation = found["steps"], found["clients"], found["activation"]
    medians = {name: statistics.median(values) for name, values in steps["seconds"].items()}
    rates = clients["pictures_per_s"]
    return f"""Machine: {json.dumps(found["machine"])}

{found["options"]["dtype"]}; adapters of rank {RANK} for every linear layer of the blocks. Ratios are medians of the
rounds' ratios.

| a step of a model of about a second a picture | ms | of the merged one's | wanted |
|---|---|---|---|
| no adapter | {1000 * medians["none"]:.1f} | {steps["of_merged"]["none"]:.2f} | |
| merged | {1000 * medians["merge"]:.1f} | 1 | |
| beside the weights | {1000 * medians["dynamic"]:.1f} | {steps["of_merged"]["dynamic"]:.2f} | at most 1.15 |
| by request | {1000 * medians["request"]:.1f} | {steps["of_merged"]["request"]:.2f} | |

| a loaded adapter becomes active | ms |
|---|---|
| merged | {activation["merge"]:.1f} |
| taken out | {activation["unmerge"]:.1f} |
| beside the weights | {activation["dynamic"]:.1f} |
| by request | nothing |

| {CLIENTS} clients of the embedded model | pictures/s |
|---|---|
| without adapters | {rates["none"]:.2f} |
| each request one of {ADAPTERS} | {rates["request"]:.2f} |
| the active one changed before each request | {rates["switching"]:.2f} |

By request it is {clients["request_of_none"]:.2f} of the rate without adapters (wanted: at least 0.8), and
{clients["request_of_switching"]:.1f} times that of changing the active one.
"""


if __name__ == "__main__":
    main()
