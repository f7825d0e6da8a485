"""Encodes pictures, clips and tensors as files.

This module must not use torch. It runs in other threads than the model, and a parallel region of torch in a second
thread makes OpenMP start more threads than there are cores, after which the model's sleep between operators.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np
import numpy.typing as npt
from av.audio.stream import AudioStream
from av.container import OutputContainer
from PIL import Image
from safetensors.numpy import save as save_safetensors

from ...protocol.errors import InvalidRequest
from ...protocol.output_formats import OutputFormat

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

_IMAGE_OPTIONS: dict[str, dict[str, int]] = {
    "png": {"compress_level": 3},  # a third of level 6's time; files are a few per cent larger
    "jpeg": {"quality": 95},
    "webp": {"quality": 95},
}
_VIDEO: dict[str, tuple[Literal["libx264", "libvpx-vp9"], dict[str, str]]] = {
    "mp4": ("libx264", {"crf": "18"}),
    "webm": ("libvpx-vp9", {"crf": "24", "b": "0", "row-mt": "1", "cpu-used": "4"}),
}
"""Each container's codec and options: constant quality, almost visually lossless."""

_SOUND: dict[str, tuple[Literal["aac", "libopus"], tuple[int, ...]]] = {
    "mp4": ("aac", (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)),
    "webm": ("libopus", (8000, 12000, 16000, 24000, 48000)),
}
"""Each container's audio codec and the sample rates that it supports."""

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
    if output_format in _VIDEO:
        return encode_video(to_uint8(pixels), fps or 1, output_format, sound)
    if pixels.ndim != 3:
        raise InvalidRequest(
            f"a clip cannot be encoded as {output_format}; ask for {', '.join(_VIDEO)} or pt", field="output_format"
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
    """Convert […, C, H, W] in [0, 1] to uint8 […, H, W, C], rounded as by diffusers' image processor."""
    rounded: Pixels = (np.moveaxis(pixels, -3, -1) * 255).round().clip(0, 255).astype(np.uint8)
    return rounded


def encode_image(image: Pixels, output_format: str) -> bytes:
    """Encode [H, W, C] as PNG, JPEG or WebP."""
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    if output_format == "jpeg":
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, format=output_format, **_IMAGE_OPTIONS[output_format])
    return file.getvalue()


def encode_video(frames: Pixels, fps: int, container: str = "mp4", sound: Waveform | None = None) -> bytes:
    """Encode [F, H, W, 3] as a video; an odd size loses its last row or column, as 4:2:0 chroma needs even sides."""
    codec, options = _VIDEO[container]
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    file = io.BytesIO()
    with av.open(file, mode="w", format=container) as opened:
        stream = opened.add_stream(codec, rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        audible = None if sound is None else _new_sound_stream(opened, sound, container)  # before the first packet
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            opened.mux(stream.encode(picture))
        opened.mux(stream.encode())
        if sound is not None and audible is not None:
            _write_sound(opened, audible, sound)
    return file.getvalue()


def _new_sound_stream(opened: OutputContainer, sound: Waveform, container: str) -> AudioStream:
    codec, rates = _SOUND[container]
    rate = min((one for one in rates if one >= sound.rate), default=rates[-1])
    return opened.add_stream(codec, rate=rate, layout="mono" if len(sound.samples) == 1 else "stereo")


def _write_sound(opened: OutputContainer, stream: AudioStream, sound: Waveform) -> None:
    """Resample to the rate and sample format of the stream's codec, dropping channels beyond two."""
    samples = np.ascontiguousarray(sound.samples[:2].clip(-1, 1), dtype=np.float32)
    heard = av.AudioFrame.from_ndarray(samples, format="fltp", layout=stream.layout.name)
    heard.sample_rate = sound.rate
    resampler = av.AudioResampler(stream.format, stream.layout, stream.rate, stream.codec_context.frame_size or None)
    for frame in [*resampler.resample(heard), *resampler.resample(None)]:
        opened.mux(stream.encode(frame))
    opened.mux(stream.encode())
