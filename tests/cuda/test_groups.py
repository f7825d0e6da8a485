"""A trainer that dies in a broadcast over NCCL costs the update, and no worker: torch's watchdog ends nobody.

By default the watchdog ends the process in which a collective is older than its timeout, and with it every worker.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from safelight.protocol.errors import Unavailable
from safelight.protocol.operations import Join
from safelight.protocol.tensor_sources import Broadcast
from safelight.worker.weights.transport import joining
from safelight.worker.weights.transport.groups import ProcessGroups

from .device import device, played_only

pytestmark = played_only  # a rank of NCCL needs a GPU for itself

SOON_S = 1.0
WAIT_S = 60.0


class Trainer:
    """Rank 0 of a group of two, in this process."""

    def __init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        self.group: Any = None

    def join(self, group: str) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=WAIT_S)
        store = PrefixStore("cuda/", PrefixStore(f"{group}/", PrefixStore(group, self.store)))
        self.group = dist.ProcessGroupNCCL(store, 0, 2, options)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    monkeypatch.setattr(joining, "LATE_S", 0.5)
    found = Trainer()
    yield found
    found.group.abort()


def joined(trainer: Trainer, name: str) -> ProcessGroups:
    groups = ProcessGroups(0, device())
    thread = threading.Thread(target=trainer.join, args=(name,))
    thread.start()
    groups.join(1, asked(trainer, name))
    deadline = time.monotonic() + WAIT_S
    while not groups.has_joined(1, late=False):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thread.join()
    groups.settle(1)
    return groups


def asked(trainer: Trainer, name: str) -> Join:
    return Join(
        address="127.0.0.1",
        port=trainer.store.port,
        rank_offset=1,
        world_size=2,
        group=name,
        backend="nccl",
        timeout_s=SOON_S,
    )


def announced(name: str) -> Broadcast:
    return Broadcast(group=name, module="transformer", names=["weight"], dtypes=["float32"], shapes=[[3]])


def test_a_broadcast_arrives_on_the_device(trainer: Trainer) -> None:
    groups = joined(trainer, "well")
    sent = torch.arange(3.0, device=device())
    work = trainer.group.broadcast(sent, 0)
    received = groups.receive(announced("well"), lambda: None)["weight"]
    work.wait()
    assert received.device == device()
    assert torch.equal(received, sent)
    groups.leave(None)


def test_a_trainer_that_never_broadcasts_fails_the_update_and_ends_no_process(trainer: Trainer) -> None:
    groups = joined(trainer, "silent")
    with pytest.raises(Unavailable, match="weight did not arrive"):
        groups.receive(announced("silent"), lambda: None)
    time.sleep(1.0)  # the watchdog of the group, half a second later, finds a collective that is too old
    assert groups.leave("silent")
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"
