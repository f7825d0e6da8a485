"""Encodes pictures and tensors as files, and by :mod:`.clips` clips.

This module must not use torch. It runs in other threads than the model, and a parallel region of torch in a second
thread makes OpenMP start more threads than there are cores, after which the model's sleep between operators.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors.numpy import save as save_safetensors

from ...protocol.errors import InvalidRequest
from ...protocol.output_formats import FORMATS, OutputFormat, formats_of

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

_IMAGE_OPTIONS: dict[str, dict[str, int]] = {
    "png": {"compress_level": 1, "compress_type": Image.RLE},
    "jpeg": {"quality": 95},
    "webp": {"quality": 95},
}
"""A filtered picture has few matches except runs, so a search for others takes time and saves little.

CPU milliseconds, and the file's size in per cent of level 3's, with Pillow 13 (zlib-ng):

| picture              | level 1, runs | level 1       | level 3       | level 6       |
|----------------------|---------------|---------------|---------------|---------------|
| photograph, 128²     |  1.0    97 %  |  1.3   100 %  |  1.4   100 %  |  1.9    97 %  |
| photograph, 512²     | 14.5   108 %  | 16.3   104 %  | 21.1   100 %  | 53.1    97 %  |
| photograph, 1024²    | 58.7    94 %  | 66.5   104 %  | 91.5   100 %  | 252.7   93 %  |
| noise, 128²          |  1.1    96 %  |  1.5   100 %  |  1.4   100 %  |  1.6    96 %  |
| flat shapes, 256²    |  1.9    79 %  |  2.1   115 %  |  2.9   100 %  |  6.2    82 %  |

The 108 % are the most that any of sixteen pictures grew by; their mean is 92 %.
"""

_LONGEST_SIDES = {"webp": 16_383, "jpeg": 65_500, "mp4": 16_384, "webm": 65_535}
"""The largest side in pixels that the format or its encoder supports."""


@dataclass(frozen=True, slots=True)
class Waveform:
    """``samples`` are [channels, samples] in [-1, 1], ``rate`` per second."""

    samples: Floats
    rate: int


def encode(pixels: Floats, output_format: OutputFormat, fps: int | None = None, sound: Waveform | None = None) -> bytes:
    """Encode a picture [C, H, W] or clip [F, C, H, W] in [0, 1]; a clip may have ``sound``.

    ``"pt"`` makes a safetensors file with the unrounded fp32 tensor ``t``, and the sound's samples as ``audio``. Raises
    ``InvalidRequest`` if the format cannot hold the output.
    """
    if output_format == "pt":
        tensors = {"t": np.ascontiguousarray(pixels)}
        if sound is None:
            return bytes(save_safetensors(tensors))
        tensors["audio"] = np.ascontiguousarray(sound.samples)
        return bytes(save_safetensors(tensors, {"audio_sample_rate": str(sound.rate)}))
    _check_sides(pixels, output_format)
    if FORMATS[output_format].holds == "video":
        from .clips import encode_video  # with PyAV, which is large, and which servers of pictures do without

        return encode_video(to_uint8(pixels), fps or 1, output_format, sound)
    if pixels.ndim != 3:
        raise InvalidRequest(
            f"a clip cannot be encoded as {output_format}; ask for {', '.join(formats_of('video'))}",
            field="output_format",
        )
    return encode_image(to_uint8(pixels), output_format)


def _check_sides(pixels: Floats, output_format: OutputFormat) -> None:
    longest = _LONGEST_SIDES.get(output_format)
    height, width = pixels.shape[-2:]
    if longest is not None and max(height, width) > longest:
        raise InvalidRequest(
            f"a side of a {output_format} file has up to {longest} pixels, and the output has {width} x {height}; "
            "ask for another output_format or a smaller size",
            field="output_format",
        )


def to_uint8(pixels: Floats) -> Pixels:
    """Convert […, C, H, W] in [0, 1] to contiguous uint8 […, H, W, C], rounded as by diffusers' image processor."""
    levels = pixels * 255
    levels.round(out=levels)
    levels.clip(0, 255, out=levels)
    return np.stack([*np.moveaxis(levels.astype(np.uint8), -3, 0)], axis=-1)


def encode_image(image: Pixels, output_format: str) -> bytes:
    """Encode [H, W, C] as PNG, JPEG or WebP."""
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    if output_format == "jpeg":
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, format=output_format, **_IMAGE_OPTIONS[output_format])
    return file.getvalue()
