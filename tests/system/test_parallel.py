"""Tensor-parallel replicas, through the whole system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from safelight.tests.live import LiveServer

from .asking import ask, ask_together, body, load_plain, picture, plain

FAMILIES = ("flux", "flux2", "sd3", "qwenimage", "zimage", "wan", "ltx", "hunyuan_video")
TOLERANCE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flags", [("--tp", "2"), ("--tp", "4", "--fuse-projections")], ids=["2", "4-fused"])
def test_several_ranks_make_the_picture_of_one(
    family: str, flags: tuple[str, ...], checkpoint: Callable[[str], Path]
) -> None:
    pipeline = load_plain(checkpoint(family))
    with LiveServer(checkpoint(family), ["--threads", "1", *flags]) as server:
        server.wait_ready()
        asked = [body(family, index) for index in range(3)]
        together = [picture(answer.json()) for answer in ask_together(server.url, asked)]
        expected = [plain(pipeline, one) for one in asked]
        for found, wanted in zip(together, expected, strict=True):
            assert (found - wanted).abs().max() <= TOLERANCE
        alone = [picture(ask(server.url, asked[0] | {"deterministic": True})) for _ in range(2)]
        assert (alone[0] == alone[1]).all()
        assert (alone[0] - expected[0]).abs().max() <= TOLERANCE
