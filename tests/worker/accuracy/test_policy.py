"""The policy: no exception without a reason and an end, and thresholds that mean what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.protocol.errors import StartFailed
from safelight.worker.accuracy.policy import Case, Policy, load_policy
from safelight.worker.accuracy.report import Distance

LIMITS = "[float32]\nrelative_l2 = 1e-5\n[low_precision]\nerror_ratio = 1.5\nbias = 0.25\n"
CASE = Case(component="vae", cls="AutoencoderKLWan", pipeline="WanPipeline", dtype="bfloat16", tp=2)
REASON = 'reason = "its encoder draws noise"\n'


def policy(tmp_path: Path, text: str) -> Policy:
    file = tmp_path / "policy.toml"
    file.write_text(LIMITS + text)
    return load_policy(file)


def test_the_policy_that_ships_can_be_read_and_asks_for_what_is_promised() -> None:
    shipped = load_policy()
    assert shipped.float32.relative_l2 == 1e-5
    assert (shipped.low_precision.error_ratio, shipped.low_precision.bias) == (1.5, 0.25)


@pytest.mark.parametrize(
    ("skip", "complaint"),
    [
        ('component = "vae"\nuntil = "torch>=99"\n', "reason"),
        ('component = "vae"\nreason = ""\nuntil = "torch>=99"\n', "reason"),
        (f'component = "vae"\n{REASON}', "until"),
        (f'component = "vae"\n{REASON}until = "when it is mended"\n', "neither a date"),
        (f'component = "vae"\n{REASON}until = "torch"\n', "no version"),
        (f'{REASON}until = "torch>=99"\n', "would hold for everything"),
        (f'componnent = "vae"\n{REASON}until = "torch>=99"\n', "componnent"),
    ],
)
def test_a_skip_without_reason_end_or_object_is_refused(skip: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match=complaint) as refused:
        policy(tmp_path, f"[[skips]]\n{skip}")
    assert str(tmp_path / "policy.toml") in str(refused.value)


@pytest.mark.parametrize(
    ("until", "holds"), [("2999-01-01", True), ("2020-01-01", False), ("torch>=99", True), ("torch>=2", False)]
)
def test_a_skip_ends_at_its_date_or_release(until: str, holds: bool, tmp_path: Path) -> None:
    made = policy(tmp_path, f'[[skips]]\ncls = "AutoencoderKLWan"\n{REASON}until = "{until}"\n')
    assert (made.skip(CASE) is not None) is holds


@pytest.mark.parametrize("other", ['dtype = "float32"', "tp = 4", 'component = "transformer"'])
def test_a_skip_holds_for_no_other_case(other: str, tmp_path: Path) -> None:
    made = policy(tmp_path, f'[[skips]]\ncls = "AutoencoderKLWan"\n{other}\n{REASON}until = "torch>=99"\n')
    assert made.skip(CASE) is None


def test_a_missing_policy_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="cannot be used"):
        load_policy(tmp_path / "nothing.toml")


def distance(**given: float | bool) -> Distance:
    zero = {"cosine": 1.0, "relative_l2": 0.0, "max_abs": 0.0, "rms": 0.0, "bias": 0.0, "finite": True}
    return Distance(**{**zero, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("runtime", "plain", "fault"),
    [
        (distance(relative_l2=1e-5), None, None),
        (distance(relative_l2=1.1e-5), None, "relative L2"),
        (distance(finite=False), None, "NaN"),
        (distance(rms=1), distance(finite=False), "NaN or Inf in the plain component"),
        (distance(rms=1.5, max_abs=1.5, bias=0.375), distance(rms=1, max_abs=1), None),
        (distance(rms=1.6, max_abs=1), distance(rms=1, max_abs=1), "RMS error"),
        (distance(rms=1, max_abs=1.6), distance(rms=1, max_abs=1), "largest error"),
        (distance(rms=1, max_abs=1, bias=-0.3), distance(rms=1, max_abs=1), "bias"),
    ],
)
def test_a_threshold_is_where_the_policy_puts_it(runtime: Distance, plain: Distance | None, fault: str | None) -> None:
    found = load_policy().fault(runtime, plain)
    assert (found is None) if fault is None else (found is not None and fault in found)
