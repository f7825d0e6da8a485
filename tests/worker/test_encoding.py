"""Files that a reader of that format reads back as what was drawn."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load

from safelight.protocol.errors import InvalidRequest
from safelight.worker.encoding import encode, to_uint8


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_a_png_holds_the_very_pixels_that_diffusers_would_return() -> None:
    drawn = pixels(3, 33, 17)
    expected = VaeImageProcessor().postprocess(drawn[None], output_type="pil", do_denormalize=[False])[0]
    picture = Image.open(io.BytesIO(encode(drawn, "png", None)))
    assert np.array_equal(np.array(picture), np.array(expected))


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lossy_formats_are_what_they_say_and_close(output_format: str) -> None:
    smooth = torch.linspace(0, 1, 64).expand(3, 64, 64)
    picture = Image.open(io.BytesIO(encode(smooth, "jpeg" if output_format == "jpeg" else "webp", None)))
    assert picture.format == output_format.upper()
    assert np.abs(np.array(picture).astype(int) - to_uint8(smooth)).mean() < 3


def test_a_tensor_arrives_bit_by_bit() -> None:
    drawn = pixels(5, 3, 8, 8).bfloat16()
    assert torch.equal(load(encode(drawn, "pt", None))["t"], drawn.float())


def test_a_clip_has_its_frames_size_and_rate() -> None:
    moving = torch.zeros(9, 3, 32, 48)
    for index, frame in enumerate(moving):
        frame[:, :, index * 4 : index * 4 + 8] = 1.0
    with av.open(io.BytesIO(encode(moving, "mp4", 12))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.width, stream.height) == ("h264", 12, 48, 32)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 9
    for index, frame in enumerate(frames):
        bright = np.flatnonzero(frame.mean(axis=(0, 2)) > 128)
        assert abs(bright.mean() - (index * 4 + 3.5)) < 1.5


def test_an_odd_size_can_be_a_clip() -> None:
    with av.open(io.BytesIO(encode(pixels(2, 3, 33, 17), "mp4", 8))) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (16, 32)


def test_a_clip_is_no_png() -> None:
    with pytest.raises(InvalidRequest):
        encode(pixels(2, 3, 8, 8), "png", None)
