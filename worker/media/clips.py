"""Encodes clips, with or without sound, as files."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer

from .encoding import Pixels, Waveform

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
