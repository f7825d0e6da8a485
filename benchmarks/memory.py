"""The cost of weights in 8 bits: bytes, CPU seconds of a picture, and the distance of outputs from fp64.

``python -m safelight.benchmarks.memory [--rounds N]`` loads a random model of about a second a picture and the embedded
one, each plain and quantized, and draws with them by turns in one process, one thread and bfloat16. Megabytes are those
of the transformer's parameters and buffers, and of weights in full precision that are in no file. Written to
``benchmarks/results/memory.json`` and ``memory.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from safelight.benchmarks.machine import describe
from safelight.benchmarks.models import save_mid_size
from safelight.benchmarks.serving import SHAPES
from safelight.protocol.config import Config
from safelight.worker.accuracy.admission import admit
from safelight.worker.model.model import Model, load_model
from safelight.worker.parallel.ranks import ALONE

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMES = ("", "int8", "fp8")
STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    middle = save_mid_size(SHAPES, Path(tempfile.gettempdir()) / "safelight-mid-size")
    found = {
        "machine": describe(),
        "rounds": options.rounds,
        "mid-size": measured(middle, options.rounds),
        "shapes": measured(SHAPES, options.rounds),
    }
    (RESULTS / "memory.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "memory.md").write_text(table(found))
    print(table(found))


def measured(checkpoint: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """For each scheme: megabytes of the transformer, CPU seconds of a picture beside the plain one, and accuracy."""
    models = {
        name: load_model(Config(model=str(checkpoint), device="cpu", dtype="bfloat16", quantize=name))
        for name in SCHEMES
    }
    seconds: dict[str, list[float]] = {name: [] for name in SCHEMES}
    for _ in range(rounds + 1):  # the first warms up
        for name, model in models.items():
            seconds[name].append(drawn(model))
    plain = statistics.median(seconds[""][1:])
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        transformer = model.pipeline.transformer
        held = sum(tensor.nbytes for tensor in (*transformer.parameters(), *transformer.buffers()))
        accuracy = admit(model, ALONE, None)["transformer"] if name else None
        found[name or "plain"] = {
            "transformer_mb": held / 1e6,
            "host_mb": sum(one.base_on_host_bytes for one in model.quantized.values()) / 1e6,
            "cpu_s": statistics.median(seconds[name][1:]),
            "slower": statistics.median(seconds[name][1:]) / plain,
            "spread": max(seconds[name][1:]) / min(seconds[name][1:]),
            "relative_l2": None if accuracy is None else accuracy.relative_l2,
            "plain_relative_l2": None if accuracy is None else accuracy.plain,
        }
    return found


def drawn(model: Model) -> float:
    """CPU seconds of one picture."""
    started = time.process_time()
    model.pipeline("a red circle", num_inference_steps=STEPS, max_sequence_length=64, output_type="pt")
    return time.process_time() - started


def table(found: dict[str, Any]) -> str:
    lines = [
        "| model | weights | transformer, MB | on the host, MB | CPU time ÷ plain | relative L2 from fp64 | plain's |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in ("mid-size", "shapes"):
        for name, one in found[model].items():
            far = (
                ["", ""]
                if one["relative_l2"] is None
                else [f"{one['relative_l2']:.4f}", f"{one['plain_relative_l2']:.4f}"]
            )
            figures = [f"{one['transformer_mb']:.1f}", f"{one['host_mb']:.1f}", f"{one['slower']:.2f}", *far]
            lines.append("| " + " | ".join([model, name, *figures]) + " |")
    machine = found["machine"]
    how = f"{machine['processor']}, one thread, torch {machine['torch']}, bfloat16, {found['rounds']} rounds by turns"
    return "\n".join([*lines, "", f"{how}; other work ran beside it.", ""])


if __name__ == "__main__":
    main()
