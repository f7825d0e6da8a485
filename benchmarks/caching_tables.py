"""The results of the benchmark of caching as Markdown."""

from __future__ import annotations

from typing import Any

from safelight.protocol.step_caching import THRESHOLDS

ROUNDINGS = ("paired", "merged", "float64", "last_bit")

SPEED_GOAL, POINTS_GOAL = 1.6, -1.0
"""A named threshold is at least so many times as fast, and at most one point worse by the judge."""

_NAMED_TEXT = """\
The thresholds with names, by easycache: requests one at a time, with and without by turns. The goal is at least {speed}
times as fast, and at most one point less by the judge.

| `cache` | computed steps of {steps} | speed-up | mean error | judge | points more than without | goal |
|---|---:|---:|---:|---:|---:|---|"""

_CACHE_TEXT = """\
The embedded model, {steps} steps, {pictures} random prompts (seed {seed}), 16 requests at a time. The error is the
mean of a pixel's, in [0, 1], against the same requests without a cache. Accuracy is the share of pictures that the
judge finds right in all five attributes. The thresholds with names were chosen from this table. Each row's speed-up is
against one run at the beginning, so it is as rough as the row `off` says. The last rows add the change of the latents
to the answer that is used again, as EasyCache's published code does.

| rule | threshold | forwards a picture | speed-up | mean error | judge |
|---|---:|---:|---:|---:|---:|"""

_PAIRING_TEXT = """\
Wan pipelines, {steps} steps; seconds without pairing over seconds with it, by turns, median of {rounds}.

| model | clip | requests at once | CPU | wall | largest difference of a pixel |
|---|---|---:|---:|---:|---:|"""

_ROUNDING_TEXT = """\
The largest difference of a pixel in {pictures} pictures of {steps} steps in float32, each from the same request alone
and unpaired: with guidance paired, with all requests in the same forwards, with the denoiser in float64, and with each
of its answers changed by one unit in the last place. In brackets the median of the pictures.

| model | paired | merged | float64 | last bit changed |
|---|---:|---:|---:|---:|"""

_PROMPT_TEXT = """\
FLUX with a T5 encoder of {text_encoder_parameters} parameters and 512 tokens, from a request's start to its first step:
{cold_ms} ms with a new prompt, {warm_ms} ms with a known one, {speedup} times faster.
"""


def tables(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine, cached, paired = found["machine"], found["step_cache"], found["guidance_pairing"]
    rounded = found["rounding"]
    names = {(rule, value): name for rule, named in THRESHOLDS.items() for name, value in named.items()}
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, one thread, torch {machine['torch']}, float32.",
        "Other work ran on the machine meanwhile, so the ratios are of CPU seconds, within one run.",
        "\n## Step cache\n",
        *_named(cached),
        "",
        _CACHE_TEXT.format(**cached),
    ]
    for row in cached["rows"]:
        name = names.get((row["rule"], row["threshold"]))
        lines.append(
            f"| {row['rule']} | {row['threshold']:g}{f' (`{name}`)' if name else ''} | {row['forwards_a_picture']} | "
            f"{row['cpu_speedup']} | {row['mean_error']:.5f} | {row['judge_percent']} % |"
        )
    lines += [
        "\n## Guidance pairing\n",
        _PAIRING_TEXT.format(**paired),
    ]
    lines += [
        f"| {row['model']} | {row['clip']} | {row['at_once']} | {row['cpu_speedup']} | {row['wall_speedup']} | "
        f"{row['largest_difference']:.0e} |"
        for row in paired["rows"]
    ]
    lines += ["\n## Rounding\n", _ROUNDING_TEXT.format(**rounded)]
    lines += [
        f"| {row['model']} | "
        + " | ".join(f"{row[name]:.0e} ({row[f'{name}_median']:.0e})" for name in ROUNDINGS)
        + " |"
        for row in rounded["rows"]
    ]
    return "\n".join([*lines, "\n## Prompt cache\n", _PROMPT_TEXT.format(**found["prompt_cache"])])


def _named(cached: dict[str, Any]) -> list[str]:
    """The rows of the thresholds that have names, with the goal."""
    rows = {(row["rule"], row["threshold"]): row for row in cached["rows"]}
    lines = [_NAMED_TEXT.format(steps=cached["steps"], speed=SPEED_GOAL)]
    for name, ratio in cached["alone"].items():
        row = rows["easycache", THRESHOLDS["easycache"][name]]
        points = row["judge_percent"] - rows["off", 0.0]["judge_percent"]
        met = "met" if ratio >= SPEED_GOAL and points >= POINTS_GOAL else "missed"
        lines.append(
            f"| `{name}` ({row['threshold']:g}) | {row['forwards_a_picture']} | {ratio} | {row['mean_error']:.5f} | "
            f"{row['judge_percent']} % | {points:+.1f} | {met} |"
        )
    return lines
