"""The model of the flow stage: a small Wan transformer with its text encoder."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from ...train.model import initialise, muon_and_adamw
from .text import ROLES, WIDTH, embed, new_umt5, tokenizer
from .vae import CHANNELS

TIMESTEPS = 1000
"""The scale of the transformer's timesteps; 0 means no noise."""


class TextToVelocity(nn.Module):
    """Noisy latents and a tokenized prompt to the velocity `noise - clean` (rectified flow, as Wan).

    `roles` is for training alone: it reads off each token what its word says, and so makes the text encoder tell the
    two colours of a caption apart. From clips alone it learns what words there are, and not their order.
    """

    def __init__(self, transformer: WanTransformer3DModel, umt5: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.umt5 = transformer, umt5
        self.roles = nn.Linear(WIDTH, len(ROLES))

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """noisy [B, 16, 5, 8, 8], sigma [B] in [0, 1], ids and mask [B, L].

        Returns the velocity [B, 16, 5, 8, 8], and each token's logits over `ROLES`, [B, L, 5].
        """
        text = embed(self.umt5, ids, mask)
        velocity: Tensor = self.transformer(
            hidden_states=noisy, timestep=sigma * TIMESTEPS, encoder_hidden_states=text, return_dict=False
        )[0]
        return velocity, self.roles(text)


def new_transformer(layers: int = 6, heads: int = 8) -> WanTransformer3DModel:
    """An untrained transformer of the Wan architecture, blocks starting as the identity (adaLN-Zero, DiT, 3.2).

    A head of 24 leaves 8 rotated dimensions each to time, row and column.
    """
    width = heads * 24
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=heads,
        attention_head_dim=24,
        num_layers=layers,
        ffn_dim=4 * width,
        text_dim=WIDTH,
        freq_dim=64,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            initialise(module, zero=name.endswith(("proj_out", "time_proj", "attn2.to_out.0")))
    for name, parameter in transformer.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.zeros_(parameter)
    return transformer


def new_model(seed: int, layers: int = 6, heads: int = 8) -> TextToVelocity:
    """The untrained model of the shipped checkpoint, or a smaller one, from a seed."""
    torch.manual_seed(seed)
    return TextToVelocity(new_transformer(layers, heads), new_umt5(tokenizer()))


def optimizers(model: TextToVelocity, rate: float) -> list[torch.optim.Optimizer]:
    """For the matrices of the transformer's blocks Muon, for everything else AdamW."""
    blocks = [p for name, p in model.transformer.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    return muon_and_adamw(model, blocks, rate)
