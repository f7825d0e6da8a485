"""The self-test cache: which results it keeps, and for which starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from safelight.protocol.config import Config
from safelight.protocol.replicas import Batching
from safelight.protocol.self_test import SelfTestResult, TaskResult
from safelight.worker.model.model import Model, load_model
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.self_test.self_test_cache import SelfTestCache

TEXT = TaskResult(
    pipeline="FluxPipeline",
    output_type="pt",
    several_images=False,
    supports_preview=True,
    batching=Batching("merged", "the self-test saw no difference"),
    tried_size={"width": 32, "height": 32},
    required=["prompt"],
)
MERGED = SelfTestResult(mode="merged", unmergeable={"vae.encode": "why"}, text=TEXT, image=None, no_image="none")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "safelight" / "self-tests"


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Model:
    return load_model(Config(model=str(checkpoint("flux")), device="cpu"))


def cache(model: Model, **options: object) -> SelfTestCache:
    return SelfTestCache(model, Config(model=model.path, **options), ALONE)  # type: ignore[arg-type]


def moved(model: Model, directory: Path) -> Model:
    """The same model, loaded from a copy of its files."""
    copy = Path(shutil.copytree(model.directory, directory / "copy"))
    return load_model(Config(model=str(copy), device="cpu"))


def test_what_was_found_holds_for_another_copy_of_the_files(model: Model, tmp_path: Path) -> None:
    cache(model).write(MERGED)
    assert cache(moved(model, tmp_path)).read() == MERGED


def test_other_files_dtypes_or_options_are_tested_anew(model: Model, tmp_path: Path) -> None:
    cache(model).write(MERGED)
    assert cache(model, port=1, max_queue=3).read() == MERGED, "these change nothing that the self-test sees"
    assert cache(model, max_batch=2).read() is None
    assert cache(model, fuse_projections=True).read() is None
    assert cache(load_model(Config(model=model.path, device="cpu", dtype="float16"))).read() is None
    other = moved(model, tmp_path)
    weights = other.directory / "transformer" / "config.json"
    os.utime(weights, ns=(0, 0))
    assert cache(other).read() is None


def test_a_result_that_a_passing_fault_may_have_made_is_not_kept(model: Model, directory: Path) -> None:
    serial = msgspec.structs.replace(TEXT, batching=Batching("serial", "why"))
    cache(model).write(msgspec.structs.replace(MERGED, mode="serial", text=serial))
    assert cache(model).read() is None
    assert not directory.exists()


def test_a_result_is_not_kept_where_one_task_of_two_is_not_merged(model: Model, directory: Path) -> None:
    serial = msgspec.structs.replace(TEXT, batching=Batching("serial", "the device had no memory left"))
    cache(model).write(msgspec.structs.replace(MERGED, image=serial))
    assert cache(model).read() is None


def test_a_package_that_was_installed_since_is_tested_with(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache(model).write(MERGED)
    (tmp_path / "site" / "sentencepiece-0.2.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert cache(model).read() is None


def test_a_result_without_a_task_that_did_not_run_is_not_kept(model: Model, directory: Path) -> None:
    cache(model).write(msgspec.structs.replace(MERGED, incomplete=True))
    assert not directory.exists()


def test_what_cannot_be_read_or_does_not_hold_is_found_out_anew(model: Model, directory: Path) -> None:
    kept = cache(model)
    kept.write(MERGED)
    (file,) = directory.iterdir()
    for content in (b"{", b'{"mode": "merged"}', b'"merged"'):
        file.write_bytes(content)
        assert kept.read() is None
    kept.write(MERGED)
    kept.remove()
    assert kept.read() is None


def test_a_cache_that_cannot_be_written_to_stops_no_start(model: Model, directory: Path) -> None:
    directory.parent.mkdir(parents=True)
    directory.write_text("not a directory")
    cache(model).write(MERGED)
    cache(model).remove()
    assert cache(model).read() is None
