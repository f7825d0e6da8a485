"""The names that diffusers and transformers give to a pipeline's components and to their methods."""

from __future__ import annotations

DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
"""Components that are called in every denoising step, in the order of the search for one."""

MERGEABLE_METHODS = frozenset({"__call__", "forward", "encode", "decode", "get_text_features", "get_image_features"})
"""Methods whose rows are independent, and that write nothing; all others run alone."""
