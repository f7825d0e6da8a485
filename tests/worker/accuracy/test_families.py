"""Every family's components, divided and fused, are what diffusers and transformers make of the same files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from safelight.tests.ranks import on_ranks
from safelight.tests.tiny import save
from safelight.tests.worker.accuracy import families, planted
from safelight.tests.worker.accuracy.families import NAMES, Found
from safelight.worker.accuracy.task import DTYPES

pytestmark = pytest.mark.timeout(1800)
"""The first case of a degree waits for all of that degree."""


@pytest.fixture(scope="module")
def checkpoints(tiny: Path) -> list[Path]:
    """All families, with their calls recorded here, once for all ranks."""
    saved = [save(name, tiny) for name in NAMES]
    with torch.no_grad():
        for checkpoint in saved:
            for dtype in DTYPES:
                families.recorded(checkpoint, dtype)
    return saved


@pytest.fixture(scope="module")
def find(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """The rows of a degree, which are made once: a parametrized fixture would be made again for each of its cases."""

    @functools.cache
    def rows_of(tp: int) -> Found:
        result = tmp_path_factory.mktemp("rows") / str(tp)
        on_ranks(tp, families.verify_families, checkpoints, result)
        return msgspec.msgpack.decode(result.read_bytes(), type=Found)

    return rows_of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tp", "fused", "dtype"),
    [
        pytest.param(tp, fused, dtype, id=f"{tp}-{'fused' if fused else 'apart'}-{dtype}")
        for tp in (1, 2, 4)
        for fused, dtype in families.cases(tp)
    ],
)
def test_a_component_that_the_runtime_computes_otherwise_is_noticed(
    find: Callable[[int], Found], name: str, tp: int, fused: bool, dtype: str, checkpoints: list[Path]
) -> None:
    rows = find(tp)[families.key(name, fused, dtype)]
    assert {row.component for row in rows} >= set(families.planned(checkpoints[NAMES.index(name)]))
    assert [row.progress for row in rows if row.status != "passed"] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwenimage_edit"])
def test_no_vae_is_compared_in_one_direction_only(name: str, find: Callable[[int], Found]) -> None:
    calls = {row.call for row in find(1)[families.key(name, False, "float32")]}
    assert {"vae.encode", "vae.decode"} <= calls


def test_a_second_transformer_is_not_left_out(find: Callable[[int], Found]) -> None:
    calls = {row.call for row in find(2)[families.key("wan22", False, "float32")]}
    assert {"transformer", "transformer_2"} <= calls


@pytest.fixture(scope="module")
def wrong(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Found:
    result = tmp_path_factory.mktemp("planted") / "rows"
    on_ranks(2, planted.plant, checkpoints[0].parent, result)
    return msgspec.msgpack.decode(result.read_bytes(), type=Found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "error"), planted.cases())
def test_a_planted_error_is_caught(kind: str, error: str, dtype: str, wrong: Found) -> None:
    rows = wrong[f"{kind} {error} {dtype}"]
    failed = {row.call: row.note for row in rows if row.status == "failed"}
    assert set(failed) == {"vae.decode" if kind == "vae" else kind}
    measure = "relative L2" if dtype == "float32" else "RMS error"
    assert all(note.startswith(measure) for note in failed.values()), failed
