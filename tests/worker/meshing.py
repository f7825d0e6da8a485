"""Each rank's part in tests of meshes; in a module that other processes can import."""

from __future__ import annotations

import torch
from torch import nn

from safelight.tests.ranks import TIMEOUT_S
from safelight.worker.parallel.mesh import AGREEMENT_S, Mesh
from safelight.worker.parallel.plan import Shard
from safelight.worker.weights.checkpoint.layout import Entry, Layout

WHOLE = torch.arange(24.0).view(6, 4)


def communicates_along_its_axes(mesh: Mesh) -> None:
    """Four ranks: two halves of guidance, each with its weights on two neighbours."""
    cfg, tp, rank = mesh.axis("cfg"), mesh.tp, mesh.world.rank
    assert (mesh.world.size, cfg.size, tp.size, mesh.axis("sp").size) == (4, 2, 2, 1)
    assert (cfg.rank, tp.rank) == divmod(rank, 2)
    assert tp.all_gather_bytes(b"%d" % rank) == [b"%d" % (2 * cfg.rank), b"%d" % (2 * cfg.rank + 1)]
    assert cfg.all_gather_bytes(b"%d" % rank) == [b"%d" % tp.rank, b"%d" % (tp.rank + 2)]
    assert float(tp.all_reduce(torch.tensor(float(rank)))) == 4 * cfg.rank + 1
    assert mesh.axis("sp").all_gather(WHOLE) == [WHOLE]
    mesh.agree("all four have failed alike")


def divides_weights_along_tp_alone(mesh: Mesh) -> None:
    module = nn.Linear(4, 3)
    layout = Layout(module, [Entry("w", "weight", (6, 4), Shard(0, (6,)))], mesh.tp)
    layout.write("w", WHOLE)
    assert torch.equal(module.weight, WHOLE.chunk(2)[mesh.tp.rank])
    assert torch.equal(layout.read("w"), WHOLE)


def waits_until_its_timeout(mesh: Mesh) -> None:
    groups = [ranks.group for ranks in (mesh.world, *mesh.axes.values())]
    assert {timeout_s(group) for group in groups} == {TIMEOUT_S}, "the start's, while a rank loads from a slow disk"
    mesh.set_timeout(7.0)
    assert {timeout_s(group) for group in groups} == {7.0}
    assert timeout_s(mesh.failures) == AGREEMENT_S


def timeout_s(group: torch.distributed.ProcessGroup | None) -> float:
    assert group is not None
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
