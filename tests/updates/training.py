"""A trainer in a process of its own, which trains and broadcasts as reinforcement-learning trainers do.

``python -m safelight.tests.updates.training CHECKPOINT`` takes a line of JSON for each call of a method of
:class:`Training`, and answers with a line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch.distributed.distributed_c10d import _new_process_group_helper, _world
from torch.distributed.rendezvous import rendezvous

from safelight.formats.digests import tensor_digest
from safelight.tests.forked import Forked
from safelight.worker.weights.snapshot.digests import raw_bytes


def init_custom_process_group(
    backend: str, init_method: str, world_size: int, rank: int, group_name: str, timeout: timedelta
) -> dist.ProcessGroup:
    """A group beside the trainer's own world: the recipe that trainers share, word for word."""
    store, rank, world_size = next(rendezvous(init_method, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    store = dist.PrefixStore(group_name, store)
    group, _ = _new_process_group_helper(
        world_size, rank, [], backend, store, group_name=group_name, backend_options=None, timeout=timeout
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


class Training:
    """The model in training. Every method is a command; what it returns is the answer."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = FluxTransformer2DModel.from_pretrained(checkpoint, subfolder="transformer")
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-2)
        self._groups: dict[str, dist.ProcessGroup] = {}

    def join(self, port: int, world_size: int, group: str, timeout_s: float = 60) -> None:
        self._groups[group] = init_custom_process_group(
            "gloo", f"tcp://127.0.0.1:{port}", world_size, 0, group, timedelta(seconds=timeout_s)
        )

    def leave(self, group: str) -> None:
        dist.destroy_process_group(self._groups.pop(group))

    def step(self) -> None:
        """A step of training on noise."""
        config = self._model.config
        guidance = torch.ones(1) if config.guidance_embeds else None
        noise = torch.randn(1, 16, config.in_channels)
        velocity = self._model(
            hidden_states=noise,
            encoder_hidden_states=torch.randn(1, 8, config.joint_attention_dim),
            pooled_projections=torch.randn(1, config.pooled_projection_dim),
            timestep=torch.rand(1),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            guidance=guidance,
        ).sample
        torch.nn.functional.mse_loss(velocity, noise).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def announced(self) -> dict[str, list[Any]]:
        """The body of ``/update_weights_from_distributed``."""
        found = self._model.state_dict()
        return {
            "names": list(found),
            "dtypes": [str(tensor.dtype) for tensor in found.values()],
            "shapes": [list(tensor.shape) for tensor in found.values()],
        }

    def digests(self) -> dict[str, str]:
        return {
            name: tensor_digest(str(tensor.dtype), tuple(tensor.shape), raw_bytes(tensor))
            for name, tensor in self._model.state_dict().items()
        }

    def broadcast(self, group: str, tensors: int) -> None:
        """The first ``tensors`` of the model's."""
        for tensor in list(self._model.state_dict().values())[:tensors]:
            dist.broadcast(tensor, src=0, group=self._groups[group])


def main() -> None:
    training = Training(Path(sys.argv[1]))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            reported = {"reported": getattr(training, name)(**arguments)}
        except RuntimeError as error:
            reported = {"error": str(error)}
        print(json.dumps(reported), flush=True)


class TrainingProcess:
    """The process, from outside. A command may be sent before the answer to it is read."""

    def __init__(self, checkpoint: Path) -> None:
        self.process = Forked(
            "safelight.tests.updates.training:main", [checkpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Self:
        assert self._read() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, name: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The answer to the last command. Raises ``RuntimeError`` with the trainer's words where it failed."""
        reported = self._read()
        if "error" in reported:
            raise RuntimeError(reported["error"])
        return reported["reported"]

    def do(self, name: str, **arguments: Any) -> Any:
        self.send(name, **arguments)
        return self.answer()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())
