"""Adapters that change whole weights, made and merged by peft; in a module that ranks' processes can import."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from safelight.protocol.adapters import ADAPTER_CONFIG, ADAPTER_FILE, SetAdapters, UnmergeAdapters
from safelight.protocol.config import Config
from safelight.worker.model.model import Model, load_model
from safelight.worker.parallel.ranks import Ranks

from .agreement import CPU, change, new_adapters, source

ATTENTION = r".*attn\.(to_q|to_out\.0|add_k_proj)|.*ff\.net\.(0\.proj|2)|.*proj_out"
"""In FLUX: rows that two ranks divide, and columns."""

CONVOLUTIONS = r".*resnets\.0\.(conv1|conv_shortcut)|.*attn1\.to_q|.*downsamplers\.0\.conv"

Make = Callable[[str], PeftConfig]

KINDS: dict[str, Make] = {
    "LoKr": lambda layers: LoKrConfig(r=4, alpha=6, target_modules=layers, init_weights=False),
    "LoKr of both": lambda layers: LoKrConfig(
        r=2, alpha=3, target_modules=layers, decompose_both=True, decompose_factor=8, init_weights=False
    ),
    "LoHa": lambda layers: LoHaConfig(r=4, alpha=6, target_modules=layers, init_weights=False),
    "DoRA": lambda layers: LoraConfig(r=4, lora_alpha=6, target_modules=layers, use_dora=True, init_lora_weights=False),
    "biases": lambda layers: LoraConfig(
        r=4, lora_alpha=6, target_modules=layers, lora_bias=True, init_lora_weights=False
    ),
}
CONVOLUTIONAL: dict[str, Make] = {
    "LoKr, Tucker": lambda layers: LoKrConfig(
        r=2, alpha=3, target_modules=layers, use_effective_conv2d=True, init_weights=False
    ),
    "LoHa, Tucker": lambda layers: LoHaConfig(
        r=4, alpha=6, target_modules=layers, use_effective_conv2d=True, init_weights=False
    ),
    **{kind: KINDS[kind] for kind in ("LoKr", "LoHa", "DoRA")},
}

Weights = dict[str, torch.Tensor]


def write(config: PeftConfig, module: nn.Module, folder: Path, strength: float = 1.0, prefix: str = "") -> Weights:
    """An adapter's directory as peft writes one, with random factors; and every tensor after peft has merged it.

    ``module`` is a copy that may be changed.
    """
    torch.manual_seed(5)
    inject_adapter_in_model(config, module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in ("lora_", "lokr_", "hada_")):
                factor = 1 + 0.2 * torch.rand_like(parameter)
                parameter.copy_(parameter * factor if "magnitude" in name else 0.2 * torch.randn_like(parameter))
    state = get_peft_model_state_dict(module)
    folder.mkdir(parents=True)
    save_file({prefix + name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / ADAPTER_FILE)
    told = {name: list(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(told, default=str))
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_scale("default", strength)  # type: ignore[operator]
            layer.merge()
    return {
        name.replace(".base_layer", ""): tensor.detach().clone()
        for name, tensor in module.state_dict().items()
        if not any(part in name for part in ("lora_", "lokr_", "hada_"))
    }


def is_merged(model: Model, component: str, expected: Weights) -> None:
    """Every tensor on this rank is its part of what is expected."""
    layout = model.layouts[component]
    for entry in layout:
        own = entry.own or entry.tensor
        whole, live = layout.part(entry.name, expected[own]), layout.live(entry.name)
        assert (live - whole).norm() <= 1e-6 * whole.norm(), own


def setting(folder: Path, mode: str = "merge", strength: float = 1.0, **options: Any) -> SetAdapters:
    return SetAdapters(
        nicknames=["x"],
        strengths=[strength],
        mode=mode,
        sources=[source(folder, "x")],
        **options,  # type: ignore[arg-type]
    )


def references(directory: Path, checkpoint: Path) -> None:
    for number, make in enumerate(KINDS.values()):
        module = DiffusionPipeline.from_pretrained(checkpoint).transformer
        torch.save(write(make(ATTENTION), module, directory / str(number)), directory / f"{number}.pt")


def every_kind(ranks: Ranks, directory: Path, checkpoint: Path, fused: bool) -> None:
    model = load_model(Config(model=str(checkpoint), device="cpu", tp=ranks.size, fuse_projections=fused), CPU, ranks)
    adapters = new_adapters(model, ranks)
    layout = model.layouts["transformer"]
    before = {entry.name: layout.live(entry.name).clone() for entry in layout}
    for number in range(len(KINDS)):
        change(adapters, setting(directory / str(number)))
        is_merged(model, "transformer", torch.load(directory / f"{number}.pt"))
        change(adapters, UnmergeAdapters())
        assert all(torch.equal(layout.live(name), tensor) for name, tensor in before.items())
