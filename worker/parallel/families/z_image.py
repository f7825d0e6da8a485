"""Z-Image: one stream, gated feed-forward layers ``w2(silu(w1) * w3)``, refiners of the same blocks."""

from __future__ import annotations

from ..plan import Family, Style
from .blocks import QKV, attention, modulation

_BLOCKS = tuple(f"{name}.*" for name in ("layers", "noise_refiner", "context_refiner", "siglip_refiner"))


def _block(path: str) -> dict[str, Style]:
    feed = f"{path}.feed_forward"
    return (
        attention(f"{path}.attention")
        | {f"{feed}.w1": "colwise", f"{feed}.w3": "colwise", f"{feed}.w2": "rowwise"}
        | modulation((f"{path}.adaLN_modulation.0",))
    )


FAMILIES = {
    "ZImageTransformer2DModel": Family(
        plan={path: style for block in _BLOCKS for path, style in _block(block).items()},
        heads=("n_heads", "n_kv_heads"),
        divided={f"{block}.attention": ("heads",) for block in _BLOCKS},
        fused={f"{block}.attention": (QKV,) for block in _BLOCKS}
        | {f"{block}.feed_forward": (("w1", "w3"),) for block in _BLOCKS},
    )
}
