"""The mesh: how the ranks of a replica are laid out along named axes, and what all of them agree on.

A layer speaks along one axis, with the ranks that share its work: ``tp`` divides weights. What concerns the replica as
a whole, votes and failures, goes over all ranks.
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
from torch.distributed import FileStore  # type: ignore[attr-defined]  # it is documented, and not in __all__
from torch.distributed.device_mesh import init_device_mesh

from ..internals.torch import set_collective_timeout
from .device import use_device
from .ranks import ALONE, RankLost, Ranks

AXES = ("cfg", "sp", "tp")
"""From the outermost to the innermost, whose ranks are neighbours and exchange most: the two halves of guidance,
parts of the sequence, parts of the weights."""

AGREEMENT_S = 2.0
"""For how long a rank whose forward has failed waits for the others to say that theirs has too.

They were together at the last collective, so that they come to the same failure within milliseconds; one that is in a
collective, which waits for this rank, never says it.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """All ranks of a replica, the ``world``, and those that share this rank's place but for one of the ``axes``.

    ``failures`` is a group for :meth:`agree` alone, so that what a rank says there never meets another's next
    collective; ``None`` where the rank is alone.
    """

    world: Ranks = ALONE
    axes: Mapping[str, Ranks] = field(default_factory=dict)
    failures: dist.ProcessGroup | None = None

    def axis(self, name: str) -> Ranks:
        """The ranks along the axis; this rank alone where nothing is divided along it."""
        assert name in AXES, name
        return self.axes.get(name, ALONE)

    @property
    def tp(self) -> Ranks:
        return self.axis("tp")

    def agree(self, failure: str) -> None:
        """Return when all ranks say that the same ``failure`` has happened to them; others do not call this.

        Raises ``RankLost`` where another rank says something else, or nothing, since it then goes on, or waits in a
        collective for this one.
        """
        if self.failures is None:
            return
        said = torch.frombuffer(bytearray(hashlib.sha256(failure.encode()).digest()), dtype=torch.uint8)
        heard = [torch.empty_like(said) for _ in range(self.world.size)]
        try:
            dist.all_gather(heard, said, group=self.failures)
        except RuntimeError as error:
            raise RankLost(f"{failure}, on this rank and not on all others") from error
        if any(not torch.equal(other, said) for other in heard):
            raise RankLost(f"{failure}, and something else on another rank")

    def limit(self, timeout_s: float) -> None:
        """From now on a collective that takes longer than ``timeout_s`` raises; NCCL ends the process."""
        for ranks in (self.world, *self.axes.values()):
            if ranks.group is not None:
                set_collective_timeout(ranks.group, timeout_s)


def join(rank: int, sizes: Mapping[str, int], meeting_place: str, device: torch.device, timeout_s: float) -> Mesh:
    """Meet the other ranks: gloo for tensors on CPUs, and NCCL beside it for those on CUDA devices.

    ``sizes`` are those of axes; one that is not in it has size 1. ``meeting_place`` is a path that no file lies at yet,
    the same for all ranks of this start. ``timeout_s`` holds until :meth:`Mesh.limit` says otherwise.
    """
    use_device(device)  # before anything opens one
    names = [name for name in AXES if sizes.get(name, 1) > 1]
    assert sizes.keys() <= set(AXES), sizes
    size = prod(sizes.values())
    if size == 1:
        return Mesh()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the ranks of a replica share a machine
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=FileStore(meeting_place, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    failures = dist.new_group(backend="gloo")
    set_collective_timeout(failures, AGREEMENT_S)  # not for meeting in it
    found = init_device_mesh(device.type, tuple(sizes[name] for name in names), mesh_dim_names=tuple(names))
    axes = {name: Ranks(found.get_local_rank(name), sizes[name], found.get_group(name), device) for name in names}
    mesh = Mesh(Ranks(rank, size, dist.group.WORLD, device), axes, failures)
    mesh.limit(timeout_s)
    for ranks in axes.values():  # NCCL connects at the first collective, which should not be a request's
        dist.all_reduce(torch.zeros(1, device=device), group=ranks.group)
    return mesh


def leave(mesh: Mesh) -> None:
    """End the groups' background threads and connections."""
    if mesh.world.group is not None:
        dist.destroy_process_group()
