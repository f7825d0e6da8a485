"""Goals of FLUX.1-dev on an H200, and the ratios of a run's figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Stages = Mapping[str, Mapping[str, Any]]
"""The figures of a model's stages."""

RATIOS = "ratios"
SERVED = ("served with CUDA graphs", "served", "served compiled")
COMPILED = "diffusers compiled"

_SERVED_GOALS = {"output_s": "at most 3.50", "batching_ratio": "at least 3.1"}
_UPDATE = "update / copy from host to device"

GOALS: dict[tuple[str, str], str] = {
    **{(stage, figure): goal for stage in SERVED for figure, goal in _SERVED_GOALS.items()},
    (COMPILED, "output_s"): "3.73 published",
    **{(RATIOS, f"{stage}: {_UPDATE}"): "at least 0.6" for stage in SERVED},
    **{(RATIOS, f"{stage} / {COMPILED}"): "at most 0.94" for stage in SERVED},
}
"""Goals by stage and figure. Outputs are pictures of 1024² in 28 steps, in bf16, without a step cache; batches are of 8
clients at 512², beside one. The seconds are those of the best published server and of compiled diffusers. The speed of
updates is that of the bus, by any route."""


def goal(model: str, stage: str, figure: str) -> str:
    return GOALS.get((stage, figure), "") if model == "flux" else ""


def ratios(stages: Stages) -> dict[str, float]:
    """Seconds of a served output by diffusers' seconds, and the speed of updates by that of a copy over the bus."""
    found: dict[str, float] = {}
    for served in (stage for stage in SERVED if stage in stages):
        for plain in ("diffusers", COMPILED):
            _add(found, f"{served} / {plain}", _figure(stages, served, "output_s"), _figure(stages, plain, "output_s"))
        copied = _figure(stages, "copies", "host_to_device_gb_per_s")
        _add(found, f"{served}: {_UPDATE}", _figure(stages, served, "update_gb_per_s"), copied)
    return found


def _figure(stages: Stages, stage: str, name: str) -> float | None:
    return stages.get(stage, {}).get(name)


def _add(found: dict[str, float], name: str, value: float | None, by: float | None) -> None:
    if value is not None and by is not None:
        found[name] = value / by
