"""Messages between ranks, and steps that every rank must take alike."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import zmq

from safelight.tests.ranks import on_mesh, on_ranks
from safelight.tests.tiny import save
from safelight.tests.worker import failing, leading, swapping
from safelight.tests.worker.limiting import gives_up_on_a_silent_rank, votes_without_the_device
from safelight.tests.worker.summing import sums_round_once
from safelight.worker.parallel.lockstep import Leader


@pytest.mark.parametrize("size", [2, 4])
def test_a_sum_in_low_precision_is_not_rounded_at_every_rank(size: int) -> None:
    on_ranks(size, sums_round_once, torch.bfloat16)


def test_what_a_pipeline_writes_to_its_components_ends_with_the_request_on_every_rank(tmp_path: Path) -> None:
    checkpoint = save(swapping.FAMILY, tmp_path)
    on_ranks(2, swapping.cancelled_and_drawn, checkpoint, swapping.references(checkpoint))


def test_a_limit_that_is_set_after_the_start_holds_for_later_collectives(tmp_path: Path) -> None:
    on_mesh({"tp": 2}, gives_up_on_a_silent_rank, tmp_path / "ended")


@pytest.mark.parametrize("size", [2, 3])
def test_a_forward_that_fails_on_all_ranks_goes_on_in_halves_on_all(size: int) -> None:
    on_mesh({"tp": size}, failing.is_short_of_memory_on_all)


def test_ranks_that_fail_in_different_forwards_do_not_take_them_for_one() -> None:
    on_mesh({"tp": 2}, failing.fails_in_another_forward)


def test_a_rank_that_would_make_another_forward_ends_before_it(rendezvous_path: str) -> None:
    on_mesh({"tp": 2}, leading.would_make_another_forward, rendezvous_path)


def test_a_leader_stops_though_the_other_ranks_are_gone(rendezvous_path: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stopping = threading.Thread(target=Leader(context, rendezvous_path, 2).stop, daemon=True)
    stopping.start()
    stopping.join(60)
    assert not stopping.is_alive()
    context.destroy(linger=0)


def test_a_vote_of_the_ranks_needs_no_memory_of_their_devices() -> None:
    on_mesh({"tp": 2}, votes_without_the_device)
