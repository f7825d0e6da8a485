"""The model of the flow stage: a small FLUX transformer with both text encoders."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
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
            initialise(module, zero="norm" in name or name == "proj_out")
    return transformer


def initialise(linear: nn.Linear, zero: bool) -> None:
    """Xavier's uniform weights, or zeros; the bias is zero."""
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
    """For the transformer's blocks Muon, for everything else AdamW."""
    return muon_and_adamw(model, _block_matrices(model.transformer), rate)


def muon_and_adamw(model: nn.Module, matrices: list[nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for `matrices`, at twice the rate of AdamW for everything else.

    Muon evens out the directions of an update, and the few that tell shapes apart are faint in the gradient.
    """
    ours = {id(matrix) for matrix in matrices}
    others = [p for p in model.parameters() if id(p) not in ours]
    return [
        torch.optim.Muon(matrices, lr=2 * rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def _block_matrices(transformer: FluxTransformer2DModel) -> list[nn.Parameter]:
    """The blocks' two-dimensional weights, without the modulations, which see one token a picture."""
    return [
        parameter
        for name, parameter in transformer.named_parameters()
        if parameter.ndim == 2 and "transformer_blocks" in name and "norm" not in name
    ]
