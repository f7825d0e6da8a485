"""Saved forwards through the whole system: what a reply and the metrics say of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from safelight.tests.serving import Servers, by_family

from .asking import ask, body, load_plain, metric, picture, plain

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", by_family("flux"))
def test_a_cached_request_says_how_many_forwards_it_saved(
    family: str, checkpoint: Callable[[str], Path], servers: Servers
) -> None:
    url = servers(family).url
    asked = body(family, num_inference_steps=12)
    cached, exact = ask(url, asked | {"cache": 1.0}), ask(url, asked | {"cache": 0})
    assert cached["skipped_forwards"] > 0
    assert exact["skipped_forwards"] == 0
    assert torch.equal(picture(exact), plain(load_plain(checkpoint(family)), asked))
    file = httpx.post(
        f"{url}/generate", json=asked | {"cache": 1.0, "output_format": "png"}, headers={"Accept": "image/png"}
    )
    assert int(file.headers["x-safelight-skipped-forwards"]) == cached["skipped_forwards"]
    skipped = 2 * cached["skipped_forwards"]
    servers(family).wait_for(lambda: metric(url, "safelight_replica_skipped_forwards_total") >= skipped or None, 60)
