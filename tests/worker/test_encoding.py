"""Files that a reader of that format reads back as what was drawn."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import get_args

import av
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.numpy import load

from safelight.protocol.errors import InvalidRequest
from safelight.protocol.output_formats import OutputFormat
from safelight.worker.media.encoding import Floats, Waveform, encode, to_uint8


def pixels(*shape: int) -> Floats:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def test_a_png_holds_the_very_pixels_that_diffusers_would_return() -> None:
    drawn = pixels(3, 33, 17)
    decoded = torch.from_numpy(drawn)[None]
    expected = VaeImageProcessor().postprocess(decoded, output_type="pil", do_denormalize=[False])[0]
    picture = Image.open(io.BytesIO(encode(drawn, "png", None)))
    assert np.array_equal(np.array(picture), np.array(expected))


@pytest.mark.parametrize("channels", [1, 3])
def test_values_between_two_levels_go_to_the_one_that_diffusers_takes(channels: int) -> None:
    halves = np.arange(256, dtype=np.float32) / 255 + np.float32(0.5 / 255)
    clip = np.minimum(np.stack([halves, np.nextafter(halves, 0), np.nextafter(halves, 1)]), 1).reshape(1, 3, 16, 16)
    clip = np.repeat(clip[..., None, :, :], channels, axis=-3)[0]
    frames = VaeImageProcessor.numpy_to_pil(np.moveaxis(clip, -3, -1))
    expected = np.stack([np.array(frame).reshape(16, 16, channels) for frame in frames])
    assert np.array_equal(to_uint8(clip), expected)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lossy_formats_are_what_they_say_and_close(output_format: str) -> None:
    smooth = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32), (3, 64, 64))
    picture = Image.open(io.BytesIO(encode(smooth, "jpeg" if output_format == "jpeg" else "webp", None)))
    assert picture.format == output_format.upper()
    assert np.abs(np.array(picture).astype(int) - to_uint8(smooth)).mean() < 3


def test_a_tensor_arrives_bit_by_bit() -> None:
    drawn = pixels(5, 8, 8, 3)
    assert np.array_equal(load(encode(np.moveaxis(drawn, -1, -3), "pt", None))["t"], np.moveaxis(drawn, -1, -3))


@pytest.mark.parametrize(("output_format", "codec"), [("mp4", "h264"), ("webm", "vp9")])
def test_a_clip_has_its_frames_size_and_rate(output_format: OutputFormat, codec: str) -> None:
    moving = np.zeros((9, 3, 32, 48), np.float32)
    for index, frame in enumerate(moving):
        frame[:, :, index * 4 : index * 4 + 8] = 1.0
    with av.open(io.BytesIO(encode(moving, output_format, 12))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.width, stream.height) == (codec, 12, 48, 32)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 9
    for index, frame in enumerate(frames):
        bright = np.flatnonzero(frame.mean(axis=(0, 2)) > 128)
        assert abs(bright.mean() - (index * 4 + 3.5)) < 1.5


def tone(hertz: float, rate: int, seconds: float) -> Floats:
    """On the left a tone, on the right silence."""
    left = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    return np.stack([left, np.zeros_like(left)]).astype(np.float32)


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100])
@pytest.mark.parametrize(("output_format", "codec"), [("mp4", "aac"), ("webm", "opus")])
def test_a_clip_s_sound_is_heard_at_its_pitch_for_as_long_as_the_clip(
    output_format: OutputFormat, codec: str, rate: int
) -> None:
    written = encode(pixels(12, 3, 32, 32), output_format, 12, Waveform(tone(440, rate, 1.0), rate))
    with av.open(io.BytesIO(written)) as container:
        stream = container.streams.audio[0]
        heard_rate = stream.codec_context.sample_rate
        assert codec in stream.codec_context.name
        planes = [frame.to_ndarray() for frame in container.decode(stream)]
    heard = np.concatenate([plane.astype(np.float32) for plane in planes], axis=1)
    left, right = heard
    spectrum = np.abs(np.fft.rfft(left[: heard_rate // 2]))
    assert abs(np.argmax(spectrum) * 2 - 440) <= 4, "Hz"
    assert np.abs(right).mean() < 0.01 * np.abs(left).mean()
    assert abs(len(left) / heard_rate - 1.0) < 0.1, "seconds"
    with av.open(io.BytesIO(written)) as container:
        assert sum(1 for _ in container.decode(container.streams.video[0])) == 12


def test_one_channel_of_sound_can_be_a_clip_s_and_a_tensor_file_has_it_bit_by_bit() -> None:
    sound = Waveform(tone(440, 24_000, 0.5)[:1], 24_000)
    with av.open(io.BytesIO(encode(pixels(4, 3, 32, 32), "mp4", 8, sound))) as container:
        assert container.streams.audio[0].codec_context.layout.name == "mono"
    stored = load(encode(pixels(4, 3, 8, 8), "pt", 8, sound))
    assert np.array_equal(stored["audio"], sound.samples)
    assert stored["t"].shape == (4, 3, 8, 8)


def test_an_odd_size_can_be_a_clip() -> None:
    with av.open(io.BytesIO(encode(pixels(2, 3, 33, 17), "mp4", 8))) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (16, 32)


_COUNT_THREADS = """
from concurrent.futures import ThreadPoolExecutor
from typing import get_args
import numpy, psutil, torch
from safelight.protocol.output_formats import OutputFormat
from safelight.worker.media.encoding import encode

torch.set_num_threads(2)
process, pool = psutil.Process(), ThreadPoolExecutor(1)
pool.submit(int).result()
before = process.num_threads()
for output_format in get_args(OutputFormat):
    drawn = numpy.zeros((2, 3, 512, 512) if output_format in ("mp4", "webm") else (3, 512, 512), numpy.float32)
    pool.submit(encode, drawn, output_format, 8).result()
    print(output_format, process.num_threads() - before)
pool.submit(torch.ones(3, 512, 512).exp).result()
print("torch", process.num_threads() - before)
"""


def test_encoding_leaves_openmp_alone() -> None:
    """A second team of OpenMP threads makes every forward slower, by two fifths where forwards are short."""
    command = [sys.executable, "-c", _COUNT_THREADS]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    more = {name: int(count) for name, count in (line.split() for line in lines if line)}
    assert more.pop("torch") > 0, "torch's own work in a thread would have been seen"
    assert more == dict.fromkeys(get_args(OutputFormat), 0)


def test_a_clip_cannot_be_a_png() -> None:
    with pytest.raises(InvalidRequest):
        encode(pixels(2, 3, 8, 8), "png", None)


@pytest.mark.parametrize(("output_format", "side"), [("webp", 16_383), ("jpeg", 65_500), ("mp4", 16_384)])
def test_a_side_beyond_what_the_format_can_hold_is_the_request_s_fault(output_format: OutputFormat, side: int) -> None:
    frames = (1,) if output_format == "mp4" else ()
    assert encode(np.zeros((*frames, 3, 8, side), np.float32), output_format)
    with pytest.raises(
        InvalidRequest, match=f"{output_format} file has up to {side} pixels.* {side + 2} x 8"
    ) as refused:
        encode(np.zeros((*frames, 3, 8, side + 2), np.float32), output_format)
    assert refused.value.field == "output_format"
