"""The page of models says what was measured, and the tiny forms that it rests on can be built."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import msgspec
import pytest

from safelight.benchmarks.coverage.build import TINY, build
from safelight.benchmarks.coverage.catalogue import exported, left_out
from safelight.benchmarks.coverage.child import PLAIN_CALLS, Noted, examined
from safelight.benchmarks.coverage.report import page, read
from safelight.benchmarks.coverage.row import Row

ROOT = Path(__file__).parents[2]
FINDINGS = read(ROOT / "benchmarks" / "results" / "coverage.json")


def test_the_page_of_models_is_what_the_results_say() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == page(FINDINGS)


def test_what_plain_diffusers_runs_is_served_and_bitwise() -> None:
    run = [row for row in FINDINGS.rows.values() if row.stage in ("serve", "done")]
    assert [row.pipeline for row in run if not (row.served and row.bitwise)] == []
    assert len(run) >= 165
    unserved = [row for row in FINDINGS.rows.values() if row.stage not in ("serve", "done", "left out")]
    assert [row.pipeline for row in unserved if row.stage not in ("build", "diffusers") or not row.reason] == []


def test_every_exported_pipeline_has_a_row() -> None:
    assert set(FINDINGS.rows) >= set(exported())


def test_particulars_are_of_pipelines_that_are_tried() -> None:
    assert [name for name in TINY if name not in exported() or left_out(name)] == []


def test_a_pipeline_that_is_served_has_been_compared() -> None:
    for row in FINDINGS.rows.values():
        assert not row.served or (row.stage == "done" and row.mode), row.pipeline


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "CogView4Pipeline", "SkyReelsV2Pipeline"])
def test_a_tiny_form_is_small_and_has_no_silent_layer(name: str) -> None:
    pipeline = build(name)
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    assert sum(parameter.numel() for parameter in denoiser.parameters()) < 1_000_000
    assert all(parameter.abs().max() > 0 for parameter in denoiser.parameters())


@pytest.mark.parametrize("family", ["QwenImage21", "Kandinsky5T2I", "Kandinsky5T2V", "LongCatImage", "NucleusMoEImage"])
def test_a_pipeline_whose_processor_needs_torchvision_is_served(family: str) -> None:
    row = FINDINGS.rows[f"{family}Pipeline"]
    assert (row.served, row.bitwise) == (True, True), row.reason


def test_an_examination_has_as_long_as_plain_diffusers_would_need_for_many_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A heavy pipeline does not count as hanging."""
    waits: list[float] = []

    class Busy:
        exitcode = None

        def __init__(self, **_: object) -> None: ...

        def start(self) -> None:
            (tmp_path / "FluxPipeline.json").write_bytes(
                msgspec.json.encode(Noted(Row("FluxPipeline", "text-to-image"), 3.0))
            )

        def join(self, timeout_s: float | None = None) -> None:
            waits.append(timeout_s or 0)

        def is_alive(self) -> bool:
            return True

        def kill(self) -> None: ...

    monkeypatch.setattr(multiprocessing.get_context("forkserver"), "Process", Busy, raising=False)
    row = examined("FluxPipeline", tmp_path, 1.0)
    assert waits == [1.0, 3.0 * PLAIN_CALLS, 0]
    assert row.reason == f"took longer than 1 s and {PLAIN_CALLS} calls of 3.0 s"
