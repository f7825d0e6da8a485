"""Shared parts of tensor-parallel plans: attention, feed-forward layers and modulations."""

from __future__ import annotations

from collections.abc import Iterable

from ..plan import Style


def attention(path: str, *, joint: bool = False) -> dict[str, Style]:
    """Shard by heads: projections by columns, the output by rows. ``joint``: text has its own projections."""
    plan: dict[str, Style] = {f"{path}.{name}": "colwise" for name in ("to_q", "to_k", "to_v")}
    plan[f"{path}.to_out.0"] = "rowwise"
    if joint:
        plan |= {f"{path}.{name}": "colwise" for name in ("add_q_proj", "add_k_proj", "add_v_proj")}
        plan[f"{path}.to_add_out"] = "rowwise"
    return plan


def feed_forward(path: str) -> dict[str, Style]:
    """Shard diffusers' ``FeedForward`` without a gate."""
    return {f"{path}.net.0.proj": "colwise", f"{path}.net.2": "rowwise"}


def modulation(paths: Iterable[str]) -> dict[str, Style]:
    """Shard the layers that compute a block's scales and shifts from one vector per sample, replicated on all ranks."""
    return dict.fromkeys(paths, "colwise_gather_output")


QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
