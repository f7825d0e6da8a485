"""What the flow stage trains: a small FLUX transformer together with both text encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextModel, T5EncoderModel

from .text import WIDTH, clip_tokenizer, new_clip, new_t5, t5_tokenizer

GRID = 8
"""Image tokens along a side of a 128-pixel picture: an eighth in the autoencoder, two latents to a token."""


class TextToVelocity(nn.Module):
    """Noisy image tokens and a tokenized prompt to the velocity `noise - clean` (rectified flow, as FLUX)."""

    def __init__(self, transformer: FluxTransformer2DModel, clip: CLIPTextModel, t5: T5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.clip, self.t5 = transformer, clip, t5

    def forward(self, noisy: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """noisy [B, 64, 64], sigma [B] in [0, 1], clip_ids [B, 32], t5_ids [B, L]; velocity [B, 64, 64]."""
        text = self.t5(t5_ids).last_hidden_state
        velocity: Tensor = self.transformer(
            hidden_states=noisy,
            timestep=sigma,
            pooled_projections=self.clip(clip_ids).pooler_output,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            img_ids=image_ids(noisy.device),
            return_dict=False,
        )[0]
        return velocity


class WideAttention(TorchFunctionMode):
    """Attention in float32 inside a bfloat16 autocast: on CPUs its backward pass is four times faster so."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*(_wide(part) for part in args), **{name: _wide(part) for name, part in kwargs.items()})


def _wide(argument: Any) -> Any:
    """A bfloat16 tensor as float32; anything else, a mask of booleans for one, as it is."""
    narrow = isinstance(argument, Tensor) and argument.dtype == torch.bfloat16
    return argument.float() if narrow else argument


def image_ids(device: torch.device) -> Tensor:
    """Row and column of each image token: [64, 3], as `FluxPipeline._prepare_latent_image_ids` numbers them."""
    ids = torch.zeros(GRID, GRID, 3, device=device)
    ids[..., 1] = torch.arange(GRID, device=device)[:, None]
    ids[..., 2] = torch.arange(GRID, device=device)[None, :]
    return ids.reshape(GRID * GRID, 3)


def new_transformer(layers: int = 2, single_layers: int = 4, heads: int = 8) -> FluxTransformer2DModel:
    """An untrained transformer of the FLUX architecture, blocks starting as the identity (adaLN-Zero, DiT, 3.2)."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=24,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 8, 8),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            _initialise(module, zero="norm" in name or name == "proj_out")
    return transformer


def _initialise(linear: nn.Linear, zero: bool) -> None:
    if zero:
        nn.init.zeros_(linear.weight)
    else:
        nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def new_model(seed: int, layers: int = 2, single_layers: int = 4, heads: int = 8) -> TextToVelocity:
    """The untrained model of the shipped checkpoint, or a smaller one, from a seed."""
    torch.manual_seed(seed)
    transformer = new_transformer(layers, single_layers, heads)
    return TextToVelocity(transformer, new_clip(clip_tokenizer()), new_t5(t5_tokenizer()))


def optimizers(model: TextToVelocity, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the blocks' matrices, at twice the rate of AdamW for everything else.

    Muon evens out the directions of an update, and the few that tell shapes apart are faint in the gradient.
    """
    matrices = {id(p): p for p in _block_matrices(model.transformer)}
    others = [p for p in model.parameters() if id(p) not in matrices]
    return [
        torch.optim.Muon(list(matrices.values()), lr=2 * rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def _block_matrices(transformer: FluxTransformer2DModel) -> list[nn.Parameter]:
    """The blocks' two-dimensional weights, without the modulations, which see one token a picture."""
    return [
        parameter
        for name, parameter in transformer.named_parameters()
        if parameter.ndim == 2 and "transformer_blocks" in name and "norm" not in name
    ]
