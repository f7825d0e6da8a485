"""A request whose single forward would hold up everybody is refused, by what forwards were seen to take."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from safelight.protocol.codec import Buffer
from safelight.protocol.config import Config, most_pixels
from safelight.protocol.costs import Measured, estimate
from safelight.protocol.generation import Failed, Image
from safelight.protocol.replicas import ReplicaStats
from safelight.tests.scheduler.stage import Stage, generate

MEASURED = {"transformer": [Measured(64 * 64, 0.01)], "vae.decode": [Measured(64 * 64, 0.04)]}


def asked(max_forward_s: float = 60.0, costs: dict[str, list[Measured]] | None = None, **given: Any) -> str | None:
    """The message with which a request is refused, where it is."""
    stage = Stage(config=Config(max_forward_s=max_forward_s, max_pixels=1 << 24))
    stage.heartbeat(0, ReplicaStats(costs=MEASURED if costs is None else costs))
    stage.server(replace(generate("r"), **given))
    failed = stage.sent(Failed, "r")
    assert all((one.error.code, one.error.status) == ("invalid_request", 400) for one in failed)
    return failed[0].error.message if failed else None


def test_a_picture_whose_one_forward_takes_minutes_is_refused_with_the_numbers() -> None:
    message = asked(width=4096, height=4096)
    assert message is not None
    for said in ("vae.decode", "16777216 pixels", f"{0.04 * 4096**2:.3g} s", "--max-forward-s allows 60 s"):
        assert said in message
    most = int(message.rpartition("at most ")[2].split()[0])
    assert asked(width=most, height=1) is None
    assert asked(width=most + 1000, height=1) is not None


def test_the_models_default_size_is_never_refused_however_slow_it_is() -> None:
    slow = {"transformer": [Measured(64 * 64, 300.0)]}
    assert asked(costs=slow) is None
    assert asked(costs=slow, width=64, height=64) is None
    assert asked(costs=slow, width=128, height=64) is not None


def test_frames_count_and_so_does_a_side_that_follows_from_an_image() -> None:
    limit_s = 1.0  # 64² x 5 pixels at most, by vae.decode
    assert asked(limit_s, width=64, height=64, num_frames=4) is None
    assert asked(limit_s, width=64, height=64, num_frames=8) is not None
    tall = Image(8, 80, Buffer(bytes(8 * 80 * 3)))
    assert asked(limit_s, width=64, images=[tall]) is not None
    assert asked(limit_s, images=[tall]) is None


def test_before_anything_is_measured_nothing_is_refused() -> None:
    assert asked(costs={}, width=4096, height=4096) is None


def test_a_replica_that_starts_again_is_judged_by_what_its_last_process_measured() -> None:
    stage = Stage(config=Config(max_pixels=1 << 24))
    stage.heartbeat(0, ReplicaStats(costs=MEASURED))
    stage.exited(0)
    stage.ready(0, pid=99)
    stage.heartbeat(0)
    stage.server(replace(generate("r"), width=4096, height=4096))
    assert stage.error("r") == "invalid_request"


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_an_estimate_is_never_too_low_where_cost_grows_up_to_the_square(exponent: float) -> None:
    def seconds(pixels: int) -> float:
        return 0.01 + 1e-9 * pixels**exponent

    measured = [Measured(pixels, seconds(pixels)) for pixels in (4096, 9216, 65536)]
    for pixels in (1024, 4096, 8000, 20000, 65536, 1 << 20, 1 << 24):
        assert estimate(measured, pixels) >= seconds(pixels) * (1 - 1e-9)


def test_the_nearest_measurement_decides() -> None:
    near = Measured(65536, 0.2)
    assert estimate([*MEASURED["transformer"], near], 65536) == pytest.approx(0.2)
    assert estimate([*MEASURED["transformer"], near], 131072) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("given", "width", "height", "expected"),
    [(0, 64, 64, 256 * 256), (0, 1024, 1024, 4096 * 4096), (0, None, None, 1 << 24), (100, 64, 64, 100)],
)
def test_the_ceiling_of_pixels_follows_from_the_models_own_size(
    given: int, width: int | None, height: int | None, expected: int
) -> None:
    assert most_pixels(Config(max_pixels=given), width, height) == expected
