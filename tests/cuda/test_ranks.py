"""Ranks on devices of their own: what one of them cannot do costs a request or the whole replica, and hangs nobody."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from safelight.protocol.generation import Sample
from safelight.tests.cuda.ranks import fails_on_the_leader_alone, is_short_of_memory_alone, own_device
from safelight.tests.ranks import on_mesh

from .device import TYPE, device, played_only
from .replica import Replica, plain_pipeline

pytestmark = pytest.mark.skipif(TYPE == "cuda" and torch.cuda.device_count() < 2, reason="it needs two GPUs")

on_two = functools.partial(on_mesh, {"tp": 2}, device_of=own_device)


@pytest.fixture
def replica(checkpoint: Callable[[str], Path]) -> Iterator[Replica]:
    """Makes the requests, and knows plain diffusers' answers."""
    found = Replica(checkpoint("flux"), device())
    yield found
    found.close()


def test_an_output_that_fails_on_the_leader_alone_costs_its_request_and_no_rank(
    replica: Replica, checkpoint: Callable[[str], Path], rendezvous_path: str
) -> None:
    path = checkpoint("flux")
    several = [Sample("a red circle", seed) for seed in range(3)]
    failing, other = replica.request(0, samples=several), replica.request(1, num_inference_steps=9)
    expected = replica.plain(other, plain_pipeline(path, device()))
    on_two(fails_on_the_leader_alone, str(path), rendezvous_path, failing, other, expected)


@played_only
@pytest.mark.parametrize("short", [0, 1])
def test_a_rank_that_alone_is_short_of_memory_ends_them_all_before_it_goes_on_in_another_way(
    short: int, replica: Replica, checkpoint: Callable[[str], Path]
) -> None:
    requests = [msgspec.structs.replace(replica.request(index), num_inference_steps=3) for index in range(4)]
    on_two(is_short_of_memory_alone, str(checkpoint("flux")), short, requests)
