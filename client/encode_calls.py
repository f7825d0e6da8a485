"""The request that encodes prompts alone, like those of :mod:`.calls`, and its reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import msgspec

from .calls import Call, by_table, given
from .errors import decode


class StoredShape(msgspec.Struct, frozen=True):
    """A tensor in a safetensors file; ``dtype`` is the format's name of it, such as ``F32``."""

    dtype: str
    shape: tuple[int, ...]


class EncodedPrompt(msgspec.Struct, frozen=True):
    """``data`` are the embeddings as a safetensors file, for ``safetensors.torch.load``; ``None`` if not asked for."""

    prompt: str
    tensors: dict[str, StoredShape]
    data: bytes | None = msgspec.field(name="b64", default=None)


class Encoding(msgspec.Struct, frozen=True):
    """The reply to :meth:`encode`: an output for each prompt, and the weights that made them.

    ``replicas`` have the prompts in their caches; empty if embeddings were asked for.
    """

    id: str
    model: str
    weight_version: str
    outputs: tuple[EncodedPrompt, ...]
    replicas: tuple[int, ...] = ()


def encode(
    prompt: str | Sequence[str], *, returns: Literal["cache", "embeddings"] = "embeddings",
    lora: Sequence[Mapping[str, Any]] | None = None, guidance_scale: float | None = None,
    true_cfg_scale: float | None = None, negative_prompt: str | None = None, priority: int | None = None,
    timeout_s: float | None = None, deterministic: bool | None = None, extra: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Call[Encoding]:  # fmt: skip
    """Encode prompts, and return their embeddings or leave them in the prompt cache of every replica.

    Guidance and further ``arguments`` are those of the generations that follow: they decide what is encoded.
    """
    fields = {
        **by_table(locals()),
        "prompt": prompt,
        "return": returns,
        "lora": None if lora is None else [dict(adapter) for adapter in lora],
        "extra": {**(extra or {}), **arguments} or None,
    }
    return Call("POST", "/encode", partial(decode, Encoding), given(fields), timeout_s)
