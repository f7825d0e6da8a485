"""Forwards that take longer than a hanging process may go unnoticed."""

from __future__ import annotations

from pathlib import Path

import httpx

from safelight.tests.live import LiveServer
from safelight.tests.tiny import save

STALL_TIMEOUT_S = 3.0


def longest_forward_s(server: LiveServer, pixels: int) -> float:
    """The longest measured forward for outputs of ``pixels``, which the next heartbeat tells."""

    def find() -> float | None:
        (replica,) = httpx.get(f"{server.url}/server_info").json()["replicas"]
        costs = [one for measured in replica["stats"]["costs"].values() for one in measured]
        return max((one["seconds"] for one in costs if one["pixels"] == pixels), default=None)

    return server.wait_for(find, 60)


def test_a_forward_longer_than_the_stall_timeout_is_finished(tmp_path: Path) -> None:
    limits = ["--max-pixels", str(8192**2), "--max-forward-s", "1e9"]
    flags = ["--threads", "1", "--stall-timeout-s", f"{STALL_TIMEOUT_S:g}", *limits]
    with LiveServer(save("flux", tmp_path), flags) as server:
        server.wait_ready()
        for side in (1024, 1536, 2048, 3072):  # until this machine takes long enough
            asked = {"prompt": "a red circle", "width": side, "height": side, "num_inference_steps": 1}
            answer = httpx.post(f"{server.url}/generate", json=asked, timeout=600)
            assert answer.status_code == 200, answer.text
            longest_s = longest_forward_s(server, side**2)
            if longest_s > 2 * STALL_TIMEOUT_S:
                break
        assert longest_s > STALL_TIMEOUT_S, "else nothing was tried"
        assert "stalled" not in server.log
