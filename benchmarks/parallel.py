"""Several ranks of one request against one: memory, bytes sent, steps per second, and CPU seconds of a rank.

``python -m safelight.benchmarks.parallel`` makes a random FLUX.1 and a random Wan transformer, of a size for CPUs, or
with ``--full`` of their real sizes in bfloat16, for CUDA. Each way (``tp``, ``ulysses``, ``cfg``) loads them in
processes of their own, one rank each, and takes steps with the two rows of guidance; the median of several rounds
counts. Written to ``benchmarks/results/parallel.json`` and ``parallel.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import FluxTransformer2DModel, ModelMixin, WanTransformer3DModel

from safelight.benchmarks.machine import describe
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Coroutine
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.forward.row_division import RowDivision
from safelight.worker.parallel.families import family_of
from safelight.worker.parallel.mesh import join, leave
from safelight.worker.parallel.sequence import split_sequence
from safelight.worker.weights.checkpoint.loader import load_component

RESULTS = Path(__file__).resolve().parent / "results"
PICTURE_TOKENS, TEXT_TOKENS = 1024, 128
ROWS = 2
"""One with the prompt, and one without, for guidance."""

AXES = {"tp": "tp", "ulysses": "sp", "cfg": "cfg"}
"""The mesh's axis of each way to share work."""


@dataclass(frozen=True)
class Case:
    """A transformer and one step's input: ``tokens`` of the picture or clip, and of the text."""

    cls: type[ModelMixin]
    config: dict[str, Any]
    dtype: torch.dtype


def cases(full: bool) -> dict[str, Case]:
    """Small ones of about 300 MB each, or the real ones (12 and 14 billion parameters)."""
    if full:
        flux, wan = {"guidance_embeds": True}, {}
        return {
            "flux": Case(FluxTransformer2DModel, flux, torch.bfloat16),
            "wan": Case(WanTransformer3DModel, wan, torch.bfloat16),
        }
    flux = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 6, "joint_attention_dim": 512}
    wan = {"num_layers": 6, "num_attention_heads": 6, "ffn_dim": 3072, "text_dim": 512}
    return {
        "flux": Case(FluxTransformer2DModel, flux, torch.float32),
        "wan": Case(WanTransformer3DModel, wan, torch.float32),
    }


def save(case: Case, folder: Path) -> int:
    """Write the random transformer; returns the bytes of its parameters."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        module = case.cls(**case.config)
    finally:
        torch.set_default_dtype(before)
    module.save_pretrained(folder, max_shard_size="2GB")
    return sum(parameter.nbytes for parameter in module.parameters())


def inputs(module: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """One step's arguments: two rows of a picture of 1,024 tokens, or a clip of as many, and 128 tokens of text."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    timestep = torch.full((ROWS,), 0.5, device=device, dtype=dtype)
    if isinstance(module, WanTransformer3DModel):
        clip = noise(ROWS, module.config.in_channels, 4, 32, 32)  # patches of 1 x 2 x 2
        text = noise(ROWS, TEXT_TOKENS, module.config.text_dim)
        return {"hidden_states": clip, "timestep": timestep * 1000, "encoder_hidden_states": text}
    side = int(PICTURE_TOKENS**0.5)
    places = torch.zeros(PICTURE_TOKENS, 3, device=device)
    places[:, 1] = torch.arange(PICTURE_TOKENS, device=device) // side
    places[:, 2] = torch.arange(PICTURE_TOKENS, device=device) % side
    guidance = {"guidance": timestep} if module.config.guidance_embeds else {}
    return {
        "hidden_states": noise(ROWS, PICTURE_TOKENS, module.config.in_channels),
        "encoder_hidden_states": noise(ROWS, TEXT_TOKENS, module.config.joint_attention_dim),
        "pooled_projections": noise(ROWS, module.config.pooled_projection_dim),
        "timestep": timestep,
        "img_ids": places,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=device),
        **guidance,
    }


def least_bytes(module: Any, itemsize: int) -> int:
    """The bytes of two all-reduces a block: one after attention and one after the feed-forward layer, of every token.

    FLUX's single blocks make both in one product, so they need one sum. Wan's cross-attention is a third.
    """
    config = module.config
    width = config.num_attention_heads * config.attention_head_dim
    if isinstance(module, WanTransformer3DModel):
        return int(ROWS * config.num_layers * 3 * PICTURE_TOKENS * width * itemsize)
    tokens = PICTURE_TOKENS + TEXT_TOKENS
    return int(ROWS * (2 * config.num_layers + config.num_single_layers) * tokens * width * itemsize)


def run_rank(options: argparse.Namespace) -> dict[str, Any]:
    """One rank's measurements; what every rank of a degree runs in a process of its own."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda", options.rank) if options.full else torch.device("cpu")
    mesh = join(options.rank, {AXES[options.way]: options.size}, options.store, device, 600.0)
    ranks = mesh.axis(AXES[options.way])
    case = cases(options.full)[options.case]
    with OwnMemory() as memory:
        loaded = load_component(
            case.cls, options.folder, dtype=case.dtype, device=device, family=family_of(case.cls), ranks=mesh.tp
        )
    if mesh.axis("sp").size > 1:
        split_sequence(loaded.module, mesh.axis("sp"))
    resources = ForwardResources(division=RowDivision.of(mesh))
    batcher = Batcher(max_batch=1, max_tokens=10**9, agree=mesh.agree, resources=resources)
    held = sum(parameter.nbytes for parameter in loaded.module.parameters())
    given = inputs(loaded.module, case.dtype, device)
    seconds, cpu, sent = [], [], 0
    for _ in range(options.steps + 1):
        sent_before, began, worked = ranks.traffic.bytes, time.perf_counter(), time.process_time()
        step(batcher, loaded.module, given)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
        sent = ranks.traffic.bytes - sent_before
    least = least_bytes(loaded.module, case.dtype.itemsize)
    leave(mesh)
    medians = {"seconds_a_step": statistics.median(seconds[1:]), "cpu_s_a_step": statistics.median(cpu[1:])}
    return {"held": held, "loading_peak": memory.grown, "sent": sent, "least": least, **medians}


def step(batcher: Batcher, module: Any, given: dict[str, Any]) -> None:
    """One call of the transformer, as a pipeline makes it."""
    call = Call("transformer", "__call__", module, (), given)
    coroutine = Coroutine(lambda: cross(call), lambda _: None)
    batcher.start(coroutine)
    while batcher.busy:
        batcher.step()
    if coroutine.error is not None:
        raise coroutine.error


class OwnMemory:
    """A context that watches this process's own host memory (``RssAnon``: mapped files are the system's to drop)."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = self._peak = self._now()

    @property
    def grown(self) -> int:
        """The peak growth in bytes."""
        return self._peak - self._start

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(name: str, folder: Path, way: tuple[str, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All ranks that share work in one way, at once."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "safelight.benchmarks.parallel", "--case", name, "--folder", str(folder)]
        command += [
            "--way",
            way[0],
            "--size",
            str(way[1]),
            "--store",
            f"{directory}/store",
            "--steps",
            str(options.steps),
        ]
        command += ["--threads", str(max(1, options.threads // way[1])), *(["--full"] if options.full else [])]
        processes = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
            for rank in range(way[1])
        ]
        outputs = [process.communicate()[0] for process in processes]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


Rounds = list[list[dict[str, Any]]]


def median_of(rounds: Rounds, field: str) -> float:
    """The median round of the slowest rank."""
    return statistics.median(max(rank[field] for rank in ranks) for ranks in rounds)


def row(name: str, way: tuple[str, int], size: int, rounds: Rounds, alone: Rounds) -> dict[str, Any]:
    found, tp = rounds[0], way[1] if way[0] == "tp" else 1
    held = max(rank["held"] for rank in found)
    seconds, cpu = median_of(rounds, "seconds_a_step"), median_of(rounds, "cpu_s_a_step")
    return {
        "model": name,
        "way": way[0],
        "ranks": way[1],
        "parameter_bytes": size,
        "held_by_a_rank": held,
        "held_to_share": held / (size / tp),
        "loading_peak_to_share": max(rank["loading_peak"] for rank in found) / (size / tp),
        "sent_a_step": found[0]["sent"],
        "sent_to_least": found[0]["sent"] / found[0]["least"] if tp > 1 else None,
        "seconds_a_step": seconds,
        "speed_to_one_rank": median_of(alone, "seconds_a_step") / seconds,
        "cpu_of_a_rank_to_one": cpu / median_of(alone, "cpu_s_a_step"),
    }


def table(found: dict[str, Any]) -> str:
    lines = [f"Machine: {json.dumps(found['machine'])}", ""]
    heads = ("model", "ranks", "parameters", "held by a rank, to its share", "host memory while loading, to its share")
    heads += ("sent a step, to the least of tp", "steps/s", "to one rank", "CPU seconds of a rank, to one")
    lines += ["| " + " | ".join(heads) + " |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for one in found["rows"]:
        sent = "" if one["sent_to_least"] is None else f"{one['sent_a_step'] / 1e6:.1f} MB, {one['sent_to_least']:.3f}"
        lines.append(
            f"| {one['model']} | {one['way']} {one['ranks']} | {one['parameter_bytes'] / 1e6:.0f} MB "
            f"| {one['held_to_share']:.3f} | {one['loading_peak_to_share']:.2f} | {sent} "
            f"| {1 / one['seconds_a_step']:.2f} | {one['speed_to_one_rank']:.2f} | {one['cpu_of_a_rank_to_one']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def ways(degrees: list[int]) -> list[tuple[str, int]]:
    """Each way to share work with its number of ranks, one rank first; the rows of guidance are for two."""
    several = [(way, degree) for degree in degrees for way in ("tp", "ulysses")]
    return [("tp", 1), *several, ("cfg", ROWS)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m safelight.benchmarks.parallel", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the real sizes, on CUDA, a GPU for each rank")
    parser.add_argument("--degrees", type=int, nargs="+", default=[2])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of measurements; the median counts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, divided among the ranks")
    for name in ("case", "folder", "store"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        options.folder = Path(options.folder)
        print(json.dumps(run_rank(options)))
        return
    found: dict[str, Any] = {"machine": describe(), "full": options.full, "rows": []}
    with tempfile.TemporaryDirectory() as directory:
        for name, case in cases(options.full).items():
            folder = Path(directory) / name
            size = save(case, folder)
            rounds: dict[tuple[str, int], Rounds] = {way: [] for way in ways(options.degrees)}
            for _ in range(options.rounds):  # in turn, so that what else the machine does slows all of them
                for way, ranks in rounds.items():
                    ranks.append(measure(name, folder, way, options))
            for way, ranks in rounds.items():
                found["rows"].append(row(name, way, size, ranks, rounds["tp", 1]))
                print(found["rows"][-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    stem = "parallel_cuda" if options.full else "parallel"
    (RESULTS / f"{stem}.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / f"{stem}.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
