"""The trainer's copy of the denoiser, which learns from the server's samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from safelight import assets
from safelight.client import Client
from safelight.client.rollouts import Rollout
from safelight.rollout.replay import log_probs
from safelight.rollout.transitions import Sampler

EMBEDDED = Path(assets.__file__).parent / "shapes"
START = Path(__file__).parent / "start.safetensors"
"""The embedded model's transformer and text encoders from early in their training, in bfloat16."""

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out", "norm.linear"]


class Policy:
    """A FLUX transformer in fp32; all of its weights learn, or a LoRA adapter of ``lora_rank``."""

    def __init__(self, lora_rank: int | None) -> None:
        self._start = _modules(load_file(START))
        self.transformer: Any = FluxTransformer2DModel.from_pretrained(EMBEDDED, subfolder="transformer")
        self.transformer.load_state_dict(self._start["transformer"])
        self._lora_rank = lora_rank
        if lora_rank is not None:
            self.transformer.requires_grad_(False)
            self.transformer.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=LORA_LAYERS))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters."""
        return [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]

    def log_probs(
        self, rollouts: Sequence[Rollout], steps: Sequence[int], sampler: Sampler, noise: float
    ) -> torch.Tensor:
        """The server's ``log_probs`` [B, len(steps)] under these weights, with gradients."""
        environments = [rollout.environment for rollout in rollouts]
        trajectories = [rollout.trajectory for rollout in rollouts]
        return log_probs({"transformer": self.transformer}, environments, trajectories, steps, sampler, noise)

    def push_start(self, client: Client) -> None:
        """Reset the server to the weights at the start of training: all three modules or none, without adapters."""
        for lora in client.loras().loaded:
            client.unload_lora(lora.nickname)
        with client.weights.begin("start", list(self._start)) as update:
            for module, tensors in self._start.items():
                update.update(tensors, target_module=module)

    def push(self, client: Client, version: str) -> None:
        """Push the learned weights to the server, verified by digest; a merged adapter is not verified."""
        if self._lora_rank is None:
            client.weights.update(self.transformer, version=version)
        else:
            adapter = get_peft_model_state_dict(self.transformer)
            client.weights.update_lora(adapter, alpha=self._lora_rank, version=version)


def _modules(named: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by module, of names such as ``transformer/proj_out.weight``; fp32."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in named.items():
        module, _, rest = name.partition("/")
        modules.setdefault(module, {})[rest] = tensor.float()
    return modules
