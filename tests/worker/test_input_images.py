"""The size of what is made from an image."""

from __future__ import annotations

import pytest

from safelight.worker.requests.input_images import fitting


@pytest.mark.parametrize(
    ("image", "given", "limit", "enlarge", "expected"),
    [
        ((100, 50), (None, None), 64 * 64, False, (96, 48)),
        ((512, 256), (None, None), 64 * 64, False, (96, 48)),
        ((512, 256), (None, None), None, False, (512, 256)),
        ((64, 32), (None, None), 480 * 832, True, (896, 448)),
        ((128, 64), (64, None), 480 * 832, True, (64, 32)),
        ((128, 64), (None, 128), 64 * 64, False, (256, 128)),
        ((128, 64), (48, 48), 64 * 64, False, (48, 48)),
        ((1, 32), (None, None), 64 * 64, False, (16, 32)),
        ((5, 5), (None, None), 64 * 64, False, (16, 16)),
    ],
)
def test_sides_are_multiples_in_the_image_s_proportions_but_for_those_given(
    image: tuple[int, int],
    given: tuple[int | None, int | None],
    limit: int | None,
    enlarge: bool,
    expected: tuple[int, int],
) -> None:
    assert fitting(image, given, 16, limit, enlarge=enlarge) == expected
