"""Measure compilation while serving: ``python -m safelight.benchmarks.compiling_serving``.

Servers of the tiny Z-Image of ``peers``, plain and compiled, are started in turns and draw for 1 and for 16 clients.
The first compiled server has an empty cache of compiled code, and the later ones what it left there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from .compiling import RESULTS
from .machine import describe
from .models import save_tiny_z_image
from .peer_servers import SIDE, running, safelight
from .peers import measure

CLIENTS = (1, 16)
SIZES = ",".join(f"{SIDE}x{SIDE}x{outputs}" for outputs in range(1, 17))
PLAIN, COMPILED = "plain", "compiled"


def one(model: Path, threads: int, environment: dict[str, str]) -> dict[str, Any]:
    """Seconds until a server answers, and its measurements by number of clients."""
    server, numbers, began = safelight(model, threads, environment), count(1), time.perf_counter()
    with running(server) as root:
        found: dict[str, Any] = {"start_s": time.perf_counter() - began}
        for clients in CLIENTS:
            found[str(clients)] = asdict(measure(server, root, clients, 6 * clients + 18, numbers))
    return found


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        model = save_tiny_z_image(Path(scratch) / "Z-Image-Turbo")
        on = {
            "SAFELIGHT_COMPILE": "on",
            "SAFELIGHT_COMPILE_SIZES": SIZES,
            "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/cache",
        }
        for _ in range(options.rounds):
            variants: dict[str, dict[str, str]] = {PLAIN: {}, COMPILED: on}
            rounds.append({name: one(model, options.threads, variant) for name, variant in variants.items()})
            print(rounds[-1], flush=True)
    return rounds


def table(found: dict[str, Any]) -> str:
    rounds = found["rounds"]
    starts = {name: [one[name]["start_s"] for one in rounds] for name in (PLAIN, COMPILED)}
    lines = [
        "# Compilation while serving",
        "",
        f"A tiny Z-Image, {SIDE}², 8 steps, bfloat16, {found['threads']} threads of {found['machine']['processor']}; "
        f"torch {found['machine']['torch']}. Medians of {len(rounds)} rounds, and the range of their "
        "ratios; CPU time is that of a picture.",
        "",
        "| clients | plain, pictures/s | compiled, pictures/s | compiled ÷ plain | CPU ms, plain | CPU ms, compiled |",
        "|---|---|---|---|---|---|",
    ]
    for clients in map(str, CLIENTS):
        rates = {name: [one[name][clients]["pictures_per_s"] for one in rounds] for name in (PLAIN, COMPILED)}
        spent = {name: [one[name][clients]["cpu_ms_per_picture"] for one in rounds] for name in (PLAIN, COMPILED)}
        ratios = [fast / slow for slow, fast in zip(rates[PLAIN], rates[COMPILED], strict=True)]
        cells = [*(f"{statistics.median(rates[name]):.1f}" for name in (PLAIN, COMPILED))]
        cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        cells += [f"{statistics.median(spent[name]):.0f}" for name in (PLAIN, COMPILED)]
        lines.append(f"| {clients} | {' | '.join(cells)} |")
    cold, *warm = starts[COMPILED]
    lines += [
        "",
        f"Seconds until the server answered: plain {statistics.median(starts[PLAIN]):.0f}; with 1 to 16 outputs "
        f"compiled, {cold:.0f} from an empty cache"
        + "".join(f", {seconds:.0f} from a filled one" for seconds in warm[:1])
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    found = {"machine": describe(), "threads": options.threads, "rounds": compare(options)}
    (RESULTS / "compiling-serving.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "compiling-serving.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
