"""A trainer: a client of a live server, and the tensors that it sends."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from safetensors.torch import load_file, save

from safelight.tests.live import LiveServer

SAFETENSORS = {"content-type": "application/x-safetensors"}
DRAWING = {
    "prompt": "a red circle", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 2,
    "output_format": "pt", "deterministic": True, "extra": {"max_sequence_length": 64},
}  # fmt: skip

Tensors = dict[str, torch.Tensor]


class Trainer:
    """Speaks with ``server``, which serves the checkpoint in ``directory`` with replicas of ``ranks`` processes."""

    def __init__(self, server: LiveServer, directory: Path, ranks: int = 1) -> None:
        self.server = server
        self.directory = directory
        self.ranks = ranks

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        given = {"json": body} if body is not None else {}
        return httpx.post(f"{self.server.url}{path}", timeout=120, **given, **options)

    def done(self, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        """The JSON of a 200. Raises ``AssertionError`` with the body of any other answer."""
        answer = self.post(path, body, **options)
        assert answer.status_code == 200, answer.text
        reported: dict[str, Any] = answer.json()
        return reported

    def send(self, tensors: Tensors, **parameters: Any) -> httpx.Response:
        return self.post(
            "/update_weights_from_tensor", content=save(tensors), headers=SAFETENSORS, params=parameters or None
        )

    def update(self, tensors: Tensors, **parameters: Any) -> dict[str, Any]:
        answer = self.send(tensors, **parameters)
        assert answer.status_code == 200, answer.text
        reported: dict[str, Any] = answer.json()
        return reported

    def restore(self) -> dict[str, Any]:
        """The checkpoint's own weights again."""
        return self.done("/update_weights_from_disk", {"model_path": str(self.directory)})

    def checksum(self) -> dict[str, str]:
        return self.done("/get_weights_checksum", {})

    def draw(self, **changes: Any) -> dict[str, Any]:
        return self.done("/generate", DRAWING | changes)

    def picture(self) -> bytes:
        return base64.b64decode(self.draw()["outputs"][0]["b64"])

    def replicas(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(f"{self.server.url}/server_info").json()["replicas"]
        return found

    def wait_all_ready(self) -> None:
        def ready() -> bool | None:
            return all(replica["state"] == "ready" for replica in self.replicas()) or None

        self.server.wait_for(ready, 120)

    def wait_lost(self, replica: int) -> None:
        """Wait until the scheduler knows that a replica is not ready."""
        self.server.wait_for(lambda: self.replicas()[replica]["state"] != "ready" or None, 60)

    def shared(self) -> Path:
        """The server's shared-memory directory."""
        return Path(httpx.get(f"{self.server.url}/server_info").json()["shared_memory"])

    def rank_processes(self, replica: int) -> list[psutil.Process]:
        """The processes of a replica's last start, in the order of their ranks; replicas start at the same time."""
        starts = re.findall(rf"started worker {replica} with process id ([\d, ]+)", self.server.log)
        return [psutil.Process(int(pid)) for pid in starts[-1].split(", ")]


def transformer(directory: Path) -> Tensors:
    return load_file(directory / "transformer" / "diffusion_pytorch_model.safetensors")


def changed(tensors: Tensors, by: float = 0.1) -> Tensors:
    return {name: tensor + by for name, tensor in tensors.items()}
