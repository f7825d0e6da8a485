"""``safelight verify``, run as a program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from safelight.tests.effort import chosen

PROGRAM = (sys.executable, "-P", "-c", "from safelight.client.cli import main; main()", "verify")
TIMEOUT_S = 280
LIMITS = "[float32]\nrelative_l2 = 1e-5\n[low_precision]\nerror_ratio = 1.5\nbias = 0.25\n"


def verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT_S)


def test_the_report_is_json_on_standard_output_and_both_files(flux: Path, tmp_path: Path) -> None:
    wanted = ("--component", "transformer", "--component", "vae", "--dtype", "float32")
    run = verify(flux, "--tp", "2", *wanted, "--json", "--report", tmp_path / "report")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert (report["passed"], report["tp"], report["pipeline"]) == (True, 2, "FluxPipeline")
    assert {row["call"] for row in report["rows"]} == {"transformer", "vae.decode", "vae.encode"}
    assert {row["dtype"] for row in report["rows"]} == {"float32"}
    transformer = next(row for row in report["rows"] if row["call"] == "transformer")
    assert 0 < transformer["runtime"]["relative_l2"] <= 1e-5, "two ranks give other last bits than one"
    assert "transformer (FluxTransformer2DModel) in float32: passed" in run.stderr
    assert json.loads((tmp_path / "report" / "accuracy.json").read_text()) == report
    assert "| transformer | FluxTransformer2DModel | float32 |" in (tmp_path / "report" / "accuracy.md").read_text()


def test_a_fault_is_status_1_and_in_the_table(flux: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    skip = '[[skips]]\ncomponent = "vae"\nreason = "only the encoders count here"\nuntil = "torch>=99"\n'
    policy.write_text(LIMITS.replace("1e-5", "1e-30") + skip)
    wanted = ("--component", "text_encoder_2", "--component", "vae", "--dtype", "float32")
    run = verify(flux, "--fuse-projections", "--tp", "2", *wanted, "--policy", policy)
    assert run.returncode == 1, run.stderr
    assert "failed: relative L2" in run.stdout
    assert "skipped: only the encoders count here, until torch>=99" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    chosen(
        (("--component", "unet"), "There is no component 'unet' with weights; there are"),
        (("--policy", "nothing.toml"), "The policy nothing.toml cannot be used"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--tp", "0"), "'0' is not a number from 1 to 64"),
        (("--dtype", "float32", "--policy", "SKIPS"), "Nothing was compared: the policy skips all of it."),
        nightly=[
            (
                ("--tp", "3", "--component", "transformer"),
                "among 3 ranks, because its num_attention_heads is 4; --tp can be 1, 2, 4",
            ),
        ],
    ),
)
def test_what_cannot_be_compared_is_status_2_and_one_sentence(
    arguments: tuple[str, ...], sentence: str, flux: Path, tmp_path: Path
) -> None:
    skips = tmp_path / "skips.toml"
    skips.write_text(f'{LIMITS}[[skips]]\ndtype = "float32"\nreason = "nothing is wanted"\nuntil = "torch>=99"\n')
    run = verify(flux, *(skips if argument == "SKIPS" else argument for argument in arguments))
    assert run.returncode == 2, run.stderr
    assert sentence in run.stderr.strip().splitlines()[-1]
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_a_path_without_a_model_is_status_2_and_one_sentence(tmp_path: Path) -> None:
    for path, sentence in ((tmp_path / "nothing", "does not exist"), (tmp_path, "has no model_index.json")):
        run = verify(path)
        assert (run.returncode, run.stdout) == (2, "")
        assert sentence in run.stderr
        assert len(run.stderr.splitlines()) == 1


@contextmanager
def running(flux: Path, temporary: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """The command with its two ranks, just started."""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [*PROGRAM, str(flux), "--tp", "2"], stderr=subprocess.PIPE, text=True, env=environment
    ) as command:
        deadline = time.monotonic() + 60
        while len(ranks := psutil.Process(command.pid).children()) < 2:
            assert command.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield command, ranks


def test_a_rank_that_dies_ends_the_command_with_one_sentence_and_no_rank_stays(flux: Path, tmp_path: Path) -> None:
    with running(flux, tmp_path) as (command, ranks):
        ranks[1].kill()
        _, said = command.communicate(timeout=60)
    assert command.returncode == 2
    assert "of 2 was killed by SIGKILL, so the components were not compared." in said.splitlines()[-1]
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_a_command_that_is_interrupted_or_killed(
    number: signal.Signals, flux: Path, tmp_path: Path
) -> None:
    with running(flux, tmp_path) as (command, ranks):
        assert command.stderr is not None
        while "passed" not in command.stderr.readline():  # a comparison was made, and the next one is under way
            assert command.poll() is None
        command.send_signal(number)
        command.communicate(timeout=60)
    assert command.returncode == (130 if number == signal.SIGINT else -number)
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
