"""Denoisers in their published sizes run merged on one device: shapes alone, so neither memory nor a GPU is needed."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch._subclasses import FakeTensorMode

from safelight.tests.effort import chosen
from safelight.worker.crossing.call import Call
from safelight.worker.forward.collate import collate
from safelight.worker.forward.signature import Signatures

from .device import PLAYED

pytestmark = pytest.mark.skipif(not PLAYED, reason="a build without GPUs needs the played device's guard")

CALLS = 16


def flux(device: str = "cuda") -> dict[str, Any]:
    """The arguments of a call for 1024², as diffusers' pipeline makes them."""
    return {
        "hidden_states": torch.empty(1, 4096, 64, dtype=torch.bfloat16, device=device),
        "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=torch.bfloat16, device=device),
        "pooled_projections": torch.empty(1, 768, dtype=torch.bfloat16, device=device),
        "timestep": torch.empty(1, dtype=torch.bfloat16, device=device),
        "guidance": torch.empty(1, device=device),
        "img_ids": torch.empty(4096, 3, device=device),
        "txt_ids": torch.empty(512, 3, device=device),
        "return_dict": False,
    }


def sd3(device: str = "cuda") -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(2, 16, 128, 128, dtype=torch.bfloat16, device=device),
        "encoder_hidden_states": torch.empty(2, 333, 4096, dtype=torch.bfloat16, device=device),
        "pooled_projections": torch.empty(2, 2048, dtype=torch.bfloat16, device=device),
        "timestep": torch.empty(2, device=device),
        "return_dict": False,
    }


def qwen_image(device: str = "cuda") -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(1, 4096, 64, dtype=torch.bfloat16, device=device),
        "encoder_hidden_states": torch.empty(1, 512, 3584, dtype=torch.bfloat16, device=device),
        "encoder_hidden_states_mask": None,
        "timestep": torch.empty(1, dtype=torch.bfloat16, device=device),
        "guidance": None,
        "img_shapes": [[(1, 64, 64)]],
        "attention_kwargs": {},
        "return_dict": False,
    }


def wan(device: str = "cuda") -> dict[str, Any]:
    """81 frames of 1280 x 720."""
    return {
        "hidden_states": torch.empty(1, 16, 21, 90, 160, dtype=torch.bfloat16, device=device),
        "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=torch.bfloat16, device=device),
        "timestep": torch.empty(1, dtype=torch.int64, device=device),
        "attention_kwargs": None,
        "return_dict": False,
    }


MODELS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "FluxTransformer2DModel": (diffusers.FluxTransformer2DModel, {"guidance_embeds": True}, flux),
    "SD3Transformer2DModel": (
        diffusers.SD3Transformer2DModel,
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        sd3,
    ),
    "QwenImageTransformer2DModel": (diffusers.QwenImageTransformer2DModel, {}, qwen_image),
    "WanTransformer3DModel": (diffusers.WanTransformer3DModel, {}, wan),
}


@pytest.mark.parametrize("name", chosen(nightly=[*MODELS]))
def test_sixteen_calls_of_full_size_are_one_forward_on_one_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operand on another device, or a value that the host must read, raises."""
    cls, config, arguments = MODELS[name]
    monkeypatch.setattr("safelight.worker.forward.signature.digest", lambda _: b"equal ids")  # they have no values
    with FakeTensorMode():
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = cls(**config).eval()
            torch.set_default_dtype(torch.float32)
        signatures = Signatures()
        parts = [signatures.read(Call("transformer", "__call__", model, (), arguments())) for _ in range(CALLS)]
        assert None not in parts
        assert len({part.signature for part in parts if part is not None}) == 1
        args, kwargs = collate([part for part in parts if part is not None])
        (made,) = model(*args, **kwargs)
        one = arguments()["hidden_states"]
        assert made.shape == (CALLS * one.shape[0], *one.shape[1:])
        assert made.device.type == "cuda"
        with pytest.raises(RuntimeError, match="device"):
            model(**(arguments() | {"timestep": torch.empty(len(one), device="cpu")}))
