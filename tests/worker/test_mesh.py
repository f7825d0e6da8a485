"""The ranks of a replica along named axes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from safelight.tests.ranks import on_mesh
from safelight.tests.worker import meshing
from safelight.worker.parallel.mesh import Mesh, join
from safelight.worker.parallel.ranks import ALONE

TWO_BY_TWO = {"cfg": 2, "tp": 2}


def test_collectives_along_an_axis_reach_no_other_ranks() -> None:
    on_mesh(TWO_BY_TWO, meshing.communicates_along_its_axes)


def test_a_second_axis_does_not_divide_weights() -> None:
    on_mesh(TWO_BY_TWO, meshing.divides_weights_along_tp_alone)


@pytest.mark.parametrize("sizes", [{"tp": 2}, TWO_BY_TWO], ids=["one axis", "two axes"])
def test_no_group_of_any_axis_keeps_a_timeout_of_its_own(sizes: dict[str, int]) -> None:
    on_mesh(sizes, meshing.waits_until_its_timeout)


def test_a_rank_alone_meets_nobody() -> None:
    mesh = join(0, {"tp": 1}, "/nowhere", torch.device("cpu"), 1.0)
    assert (mesh.world, mesh.tp, mesh.axis("cfg")) == (ALONE, ALONE, ALONE)
    mesh.agree("it has failed")
    mesh.set_timeout(1.0)
    assert mesh.failures is Mesh().failures is None


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_has_its_own_gpu_before_it_opens_any(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    class Met(Exception):
        pass

    def meet(*_: object, **__: object) -> None:
        done.append("met")
        raise Met

    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(dist, "init_process_group", meet)
    device = torch.device("cuda", 1)
    if size == 1:
        join(0, {"tp": 1}, str(tmp_path / "store"), device, 1.0)
        assert done == [device]
    else:
        with pytest.raises(Met):
            join(0, {"tp": 2}, str(tmp_path / "store"), device, 1.0)
        assert done == [device, "met"]
