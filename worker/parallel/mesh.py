"""The mesh: the ranks of a replica along named axes, and their agreement on failures.

A layer's collectives run along one axis, among the ranks that share its work: ``tp`` divides weights. Votes and
failures concern the whole replica and run over all ranks.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]  # documented, but not in __all__
from torch.distributed.device_mesh import init_device_mesh

from ..internals.torch import set_collective_timeout
from .device import use_device
from .ranks import ALONE, RankLost, Ranks

AXES = ("cfg", "sp", "tp")
"""From the outermost to the innermost, whose ranks are neighbours and communicate most: the two halves of guidance,
parts of the sequence, parts of the weights."""

AGREEMENT_S = 2.0
"""Seconds that a rank whose forward has failed waits for the other ranks to report the same failure.

All ranks were together at the last collective, so they reach the same failure within milliseconds. A rank that waits
in a collective for this one never reports it.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """The ``world`` (all ranks of the replica), and for each of the ``axes`` the ranks along it through this rank.

    Only :meth:`agree` uses the group ``failures``, so that its messages never meet another rank's next collective.
    It is ``None`` if the rank is alone.
    """

    world: Ranks = ALONE
    axes: Mapping[str, Ranks] = field(default_factory=dict)
    failures: dist.ProcessGroup | None = None

    def axis(self, name: str) -> Ranks:
        """The ranks along the axis; this rank alone if the axis has size 1."""
        assert name in AXES, name
        return self.axes.get(name, ALONE)

    @property
    def tp(self) -> Ranks:
        return self.axis("tp")

    def agree(self, failure: str) -> None:
        """Return when all ranks have reported the same ``failure``; ranks without a failure do not call this.

        Raises ``RankLost`` if another rank reports a different failure or none: it has gone on, or waits in a
        collective for this rank.
        """
        if self.failures is None:
            return
        own = torch.frombuffer(bytearray(hashlib.sha256(failure.encode()).digest()), dtype=torch.uint8)
        gathered = [torch.empty_like(own) for _ in range(self.world.size)]
        try:
            dist.all_gather(gathered, own, group=self.failures)
        except RuntimeError as error:
            raise RankLost(f"{failure}, on this rank and not on all others") from error
        if any(not torch.equal(other, own) for other in gathered):
            raise RankLost(f"{failure}, and something else on another rank")

    def set_timeout(self, timeout_s: float) -> None:
        """Bound every later collective: after ``timeout_s`` gloo raises, and NCCL ends the process."""
        for ranks in (self.world, *self.axes.values()):
            if ranks.group is not None:
                set_collective_timeout(ranks.group, timeout_s)


def join(rank: int, sizes: Mapping[str, int], rendezvous_path: str, device: torch.device, timeout_s: float) -> Mesh:
    """Connect to the other ranks: gloo for tensors on CPUs, and also NCCL for tensors on CUDA devices.

    ``sizes`` maps axes to sizes; an axis that is missing has size 1. ``rendezvous_path`` is the same for all ranks of
    this start, and no file may exist there. ``timeout_s`` bounds collectives until :meth:`Mesh.set_timeout`.
    """
    use_device(device)  # before anything opens another device
    names = [name for name in AXES if sizes.get(name, 1) > 1]
    assert sizes.keys() <= set(AXES), sizes
    size = prod(sizes.values())
    if size == 1:
        return Mesh()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks of a replica share a machine
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=FileStore(rendezvous_path, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    failures = dist.new_group(backend="gloo")
    set_collective_timeout(failures, AGREEMENT_S)  # not for the rendezvous
    found = init_device_mesh(device.type, tuple(sizes[name] for name in names), mesh_dim_names=tuple(names))
    axes = {name: Ranks(found.get_local_rank(name), sizes[name], found.get_group(name), device, name) for name in names}
    mesh = Mesh(Ranks(rank, size, dist.group.WORLD, device), axes, failures)
    mesh.set_timeout(timeout_s)
    for ranks in axes.values():  # NCCL connects at the first collective; no request should wait for that
        dist.all_reduce(torch.zeros(1, device=device), group=ranks.group)
    return mesh


def leave(mesh: Mesh) -> None:
    """End the groups' background threads and connections."""
    if mesh.world.group is not None:
        dist.destroy_process_group()
