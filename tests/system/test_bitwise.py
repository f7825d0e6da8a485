"""The whole system beside plain diffusers: nothing between the socket and the pipeline may change a bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelight.tests.live import LiveServer
from safelight.tests.serving import Servers, by_family
from safelight.tests.tiny import LIVE_FAMILIES

from .asking import ask, ask_together, body, load_plain, picture, plain, stats

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRED = ("wan",)
"""Families whose two calls a step are one forward, so that a solo request is merged with itself."""


@pytest.mark.parametrize("family", by_family(*LIVE_FAMILIES))
def test_solo_requests_are_bitwise_diffusers_and_merged_ones_are_close(
    family: str, checkpoint: Callable[[str], Path], servers: Servers
) -> None:
    pipeline = load_plain(checkpoint(family))
    bodies = [body(family, index) for index in range(6)]
    expected = [plain(pipeline, asked) for asked in bodies]
    server = servers(family)
    before = stats(server.url)
    alone = (picture(ask(server.url, bodies[1])) - expected[1]).abs().max()
    assert alone <= (1e-4 if family in PAIRED else 0)
    answers = ask_together(server.url, bodies)
    assert torch.equal(picture(ask(server.url, bodies[0] | {"deterministic": True})), expected[0]), "deterministic"
    server.wait_for(lambda: stats(server.url)["outputs"] == before["outputs"] + 8 or None, 10)
    after = stats(server.url)
    worst = max((picture(a.json()) - e).abs().max().item() for a, e in zip(answers, expected, strict=True))
    assert worst <= 1e-4
    assert (after["predicted_calls"] > before["predicted_calls"]) == (family in PAIRED)
    assert after["forwards"] - before["forwards"] < after["calls"] - before["calls"]


def test_a_seed_gives_the_same_picture_next_to_a_cancelled_request_and_after_a_restart(
    checkpoint: Callable[[str], Path],
) -> None:
    asked = body("flux", 1, deterministic=True)
    seen = []
    for _ in range(2):
        with LiveServer(checkpoint("flux"), ["--threads", "1"]) as server:
            server.wait_ready()
            seen.append(picture(ask(server.url, asked)))
            doomed = body("flux", 2, num_inference_steps=900, timeout_s=0.4)
            answers = ask_together(server.url, [doomed, asked, doomed])
            assert [answer.status_code for answer in answers] == [504, 200, 504]
            seen += [picture(answers[1].json()), picture(ask(server.url, asked))]
            assert server.stop() == 0
    assert all(torch.equal(seen[0], other) for other in seen[1:])
