"""The benchmark for a GPU runs unattended where one is at hand for minutes: its stages are tried without one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.benchmarks.full_size import MODELS, built
from safelight.benchmarks.gpu import NEEDS_S
from safelight.benchmarks.gpu_run import Figures, Run
from safelight.benchmarks.gpu_serving import updates
from safelight.client.transports import TransportName
from safelight.server.schemas import GenerateBody, parse_generate
from safelight.tests.effort import chosen

BILLIONS = {"flux": 11.9, "z-image": 6.2, "wan": 1.4, "qwen-image": 20.4}
"""Parameters of the denoisers. Their model cards round them: 12, 6, 1.3 and 20."""


@pytest.mark.parametrize("name", MODELS)
def test_a_denoiser_has_the_size_of_the_published_one(name: str) -> None:
    pipeline = built(MODELS[name], torch.device("meta"), torch.bfloat16, tiny=False)
    parameters = list(pipeline.transformer.parameters())
    assert round(sum(parameter.numel() for parameter in parameters) / 1e9, 1) == BILLIONS[name]
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}


@pytest.mark.parametrize("name", MODELS)
def test_a_server_takes_the_request_of_each_model(name: str) -> None:
    for output in (MODELS[name].output, MODELS[name].tiny_output):
        body = parse_generate(json.dumps({"prompt": "a star", **output}).encode())
        assert not body.extra.keys() & GenerateBody.model_fields.keys(), "they would be refused"


SHORT = {"diffusers", "checkpoint", "served"}
DRY_STAGES = {
    "flux": SHORT | {"copies", "checkpoint to compile", "diffusers compiled"},
    "z-image": SHORT,
    "wan": SHORT,
    "qwen-image": SHORT,
}


@pytest.mark.parametrize("name", chosen("flux", nightly=["z-image", "wan", "qwen-image"]))
def test_a_dry_run_finishes_every_stage(name: str, tmp_path: Path) -> None:
    parts = ["flux", "flux-compiled"] if name == "flux" else [name]
    command = [sys.executable, "-m", "safelight.benchmarks.gpu", "--dry", "--only", *parts, "--results", str(tmp_path)]
    subprocess.run(command, check=True, timeout=600)
    found = json.loads((tmp_path / "gpu.json").read_text())
    stages = found["models"][name]
    assert set(stages) == DRY_STAGES[name]
    assert [stage for stage, figures in stages.items() if "error" in figures or "skipped" in figures] == []
    assert stages["checkpoint"]["gb"] > 0
    assert stages["served"]["first_output_s"] > stages["served"]["output_s"] > 0
    compiled = {"served / diffusers compiled", "served: update / copy from host to device"}
    assert set(found["ratios"][name]) == {"served / diffusers", *(compiled if name == "flux" else ())}


def test_every_model_has_its_time_before_the_compiled_stages() -> None:
    *first, last = NEEDS_S
    assert (first, last) == ([*MODELS], "flux-compiled")
    assert sum(sum(NEEDS_S[part].values()) for part in first) <= 7.5 * 60


def test_a_figure_stands_beside_its_goal_and_gives_its_ratios(tmp_path: Path) -> None:
    run = Run(minutes=1, results=tmp_path, options={})
    served = {"output_s": 3.0, "batching_ratio": 3.25, "update_gb_per_s": 30.0}
    for stage, figures in (
        ("diffusers", {"output_s": 6.0}),
        ("copies", {"host_to_device_gb_per_s": 40.0}),
        ("served with CUDA graphs", served),
        ("diffusers compiled", {"output_s": 4.0}),
    ):
        assert run.stage("flux", stage, 1, lambda: iter([figures]))  # noqa: B023  # called here
    assert run.found["ratios"]["flux"] == {
        "served with CUDA graphs / diffusers": 0.5,
        "served with CUDA graphs / diffusers compiled": 0.75,
        "served with CUDA graphs: update / copy from host to device": 0.75,
    }
    rows = (tmp_path / "gpu.md").read_text()
    for row in (
        "| flux | served with CUDA graphs | output_s | 3 | at most 3.50 |",
        "| flux | served with CUDA graphs | batching_ratio | 3.25 | at least 3.1 |",
        "| flux | diffusers compiled | output_s | 4 | 3.73 published |",
        "| flux | ratios | served with CUDA graphs: update / copy from host to device | 0.75 | at least 0.6 |",
        "| flux | ratios | served with CUDA graphs / diffusers compiled | 0.75 | at most 0.94 |",
    ):
        assert row in rows


def test_a_stage_that_fails_or_does_not_fit_loses_no_figure(tmp_path: Path) -> None:
    def fails() -> Figures:
        yield {"start_s": 3.0}
        yield {"output_s": 1.0}
        raise KeyError("an error that nobody expects")

    run = Run(minutes=1, results=tmp_path, options={})
    assert run.stage("flux", "first", 1, lambda: iter([{"output_s": 2.0}]))
    assert not run.stage("flux", "second", 1, fails)
    assert not run.stage("flux", "third", 61, lambda: iter([{"output_s": 3.0}]))
    stages = json.loads((tmp_path / "gpu.json").read_text())["models"]["flux"]
    assert stages["first"]["output_s"] == 2.0
    assert (stages["second"]["start_s"], stages["second"]["output_s"]) == (3.0, 1.0)
    assert "an error that nobody expects" in stages["second"]["error"]
    assert "in fails" in stages["second"]["traceback"]
    assert "skipped" in stages["third"]
    assert "| flux | first | output_s | 2 |  |" in (tmp_path / "gpu.md").read_text()


def test_a_figure_is_on_disk_before_the_next_one_is_measured(tmp_path: Path) -> None:
    seen: list[str] = []

    def two() -> Figures:
        yield {"start_s": 3.0}
        seen.append((tmp_path / "gpu.json").read_text())
        yield {"output_s": 1.0}

    Run(minutes=1, results=tmp_path, options={}).stage("flux", "served", 1, two)
    assert json.loads(seen[0])["models"]["flux"]["served"] == {"start_s": 3.0}


def test_a_stage_that_hangs_is_stopped_and_the_next_one_runs(tmp_path: Path) -> None:
    ended: list[bool] = []

    def hangs() -> Figures:
        try:
            yield {"start_s": 3.0}
            with suppress(Exception):  # as libraries do
                threading.Event().wait()
        finally:
            ended.append(True)

    run = Run(minutes=1, results=tmp_path, options={})
    assert not run.stage("flux", "first", 0.1, hangs)
    assert ended, "as a server is, that it had started"
    assert run.stage("flux", "second", 1, lambda: iter([{"output_s": 2.0}]))
    first = run.found["models"]["flux"]["first"]
    assert (first["start_s"], first["error"].partition(":")[0]) == (3.0, "TooLong")


def test_a_machine_that_opens_no_handles_of_another_process_still_has_figures_of_updates() -> None:
    def update(route: TransportName) -> None:
        if route == "ipc":
            raise RuntimeError("CUDA error: invalid device context")

    found: dict[str, Any] = {}
    for figures in updates(update, "ipc", gigabytes=1.0):
        found |= figures
    assert found["route"] == "shared"
    assert "invalid device context" in found["ipc_error"]
    assert found["first_update_gb_per_s"] > 0 < found["update_gb_per_s"]
