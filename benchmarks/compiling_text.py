"""Measure the compilation of text encoders: ``python -m safelight.benchmarks.compiling_text``.

Random encoders of the two kinds that pipelines have encode prompts with plain blocks and with compiled ones, in turns
and in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .compiling import RESULTS
from .machine import describe

TOKENS = (64, 256)


def encoders() -> dict[str, Any]:
    """Four layers of T5 and of Qwen3, 512 wide."""
    import torch
    from transformers import Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

    torch.manual_seed(0)
    t5 = T5Config(vocab_size=1024, d_model=512, d_ff=2048, num_layers=4, num_heads=8, feed_forward_proj="gated-gelu")
    qwen3 = Qwen3Config(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    return {"T5": T5EncoderModel(t5).eval(), "Qwen3": Qwen3Model(qwen3).eval()}


def measure(module: Any, rounds: int) -> dict[str, Any]:
    """CPU seconds of an encoding by number of tokens, plain and compiled, and of the whole compilation."""
    import torch

    from safelight.worker.accuracy.judging import judge
    from safelight.worker.accuracy.policy import load_policy
    from safelight.worker.compiling.compiler import Compiler

    name = "text_encoder"
    inputs = {tokens: {"input_ids": torch.arange(tokens)[None] % 1000, "use_cache": False} for tokens in TOKENS}
    for arguments in inputs.values():
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    compiler = Compiler({name: module}, partial(judge, load_policy()))

    def compiled(arguments: dict[str, Any]) -> None:
        with compiler.active(name):
            module(**arguments, output_hidden_states=True)

    began = _cpu()
    for arguments in [*inputs.values()] * 2:
        compiled(arguments)
        compiler.wait()
    found: dict[str, Any] = {"compile_cpu_s": _cpu() - began}
    before = compiler.stats()[name].eager_calls
    for tokens, arguments in inputs.items():
        plain, fast = [], []
        for _ in range(rounds):
            plain.append(_seconds(partial(module, **arguments, output_hidden_states=True)))
            fast.append(_seconds(partial(compiled, arguments)))
        found[str(tokens)] = {"plain_s": min(plain), "compiled_s": min(fast)}
    stats = compiler.stats()[name]
    return found | {"state": stats.state, "reason": stats.reason, "eager_calls": stats.eager_calls - before}


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _seconds(function: Callable[[], Any]) -> float:
    before = time.process_time()
    function()
    return time.process_time() - before


def table(found: dict[str, Any]) -> str:
    lines = [
        "# Compilation of text encoders",
        "",
        f"Four random layers of each kind, 512 wide, float32, one thread of {found['machine']['processor']}; torch "
        f"{found['machine']['torch']}. CPU seconds, the least of {found['rounds']}, plain and compiled in turns.",
        "",
        "| | tokens | plain, s | compiled, s | plain ÷ compiled | compilation, CPU s | state |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        for tokens in map(str, TOKENS):
            plain, fast = row[tokens]["plain_s"], row[tokens]["compiled_s"]
            state = row["state"] if row["reason"] is None else f"{row['state']}: {row['reason']}"
            lines.append(
                f"| {name} | {tokens} | {plain:.4f} | {fast:.4f} | {plain / fast:.2f} | {row['compile_cpu_s']:.1f} "
                f"| {state} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        rows = {name: measure(module, options.rounds) for name, module in encoders().items()}
    found = {"machine": describe(), "rounds": options.rounds, "rows": rows}
    (RESULTS / "compiling-text.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "compiling-text.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
