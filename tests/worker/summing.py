"""Each rank's part in the test of sums in low precision; in a module that other processes can import."""

from __future__ import annotations

import torch

from safelight.worker.parallel.ranks import Ranks


def sums_round_once(ranks: Ranks, dtype: torch.dtype) -> None:
    seeds = (torch.Generator().manual_seed(rank) for rank in range(ranks.size))
    everyones = [torch.randn(3, 7, generator=seed).to(dtype) for seed in seeds]
    wanted = torch.stack(everyones).sum(dim=0, dtype=torch.float32).to(dtype)
    given = everyones[ranks.rank]
    found = ranks.all_reduce(given)
    assert found is given
    assert torch.equal(found, wanted)
    assert ranks.traffic.bytes == given.nbytes
