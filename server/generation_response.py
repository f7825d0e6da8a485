"""The reply to a finished request: JSON, or the file itself with the other fields in headers."""

from __future__ import annotations

import asyncio
import base64
from typing import Any
from urllib.parse import quote

import msgspec
import orjson
from fastapi import Response

from ..protocol.adapters import Drawn
from ..protocol.codec import Buffer
from ..protocol.generation import Generate, Output, Result
from ..protocol.output_formats import FORMATS
from .unread import Unread, UnreadReply

OFF_THE_LOOP = 256 * 1024
"""From this size on, base64 and JSON are encoded in a thread, so that other requests do not wait."""

_ROUNDED = ("width", "height", "num_frames")


class Reply:
    """``result`` of the request ``asked``, with its id, and with ``total_s`` measured in the server."""

    def __init__(self, request_id: str, model: str, asked: Generate, result: Result, total_s: float) -> None:
        self._id = request_id
        self._warnings = _warnings(asked, result)
        self._model = model
        self._result = result
        self._timings = msgspec.structs.replace(result.timings, total_s=total_s)

    async def as_json(self, unread: Unread) -> bytes:
        """``unread`` counts the outputs while they are encoded."""
        size = sum(len(output.data) for output in self._result.outputs)
        if size <= OFF_THE_LOOP:
            return self._as_json()
        with unread.sending(size):
            return await asyncio.to_thread(self._as_json)

    def as_file(self, unread: Unread) -> Response:
        """The file of the only output."""
        (output,) = self._result.outputs
        data, kind = memoryview(output.data.data).cast("B"), FORMATS[output.format].media_type
        return UnreadReply([data], unread, kind, headers=self._headers(output))

    def _as_json(self) -> bytes:
        reply = {
            "id": self._id,
            "model": self._model,
            "weight_version": self._result.weight_version,
            "weight_versions": self._result.weight_versions,
            "adapters": msgspec.to_builtins(self._result.adapters),
            "outputs": [_output(output) for output in self._result.outputs],
            "timings": msgspec.to_builtins(self._timings),
            "steps": self._result.steps,
            "skipped_forwards": self._result.skipped_forwards,
            "warnings": self._warnings,
        }
        return orjson.dumps(reply)

    def _headers(self, output: Output) -> dict[str, str]:
        values: dict[str, Any] = {
            "id": self._id,
            "model": self._model,
            "weight-version": self._result.weight_version,
            "weight-versions": ", ".join(self._result.weight_versions),
            "adapters": ", ".join(map(_adapter, self._result.adapters)) or None,
            "seed": output.seed,
            "steps": self._result.steps,
            "skipped-forwards": self._result.skipped_forwards or None,
            "width": output.width,
            "height": output.height,
            "num-frames": output.num_frames,
            "fps": output.fps,
            "audio-sample-rate": output.audio_sample_rate,
            "warnings": " ".join(self._warnings) or None,
        }
        values |= {name.replace("_", "-"): f"{s:.6f}" for name, s in msgspec.structs.asdict(self._timings).items()}
        return {
            f"X-Safelight-{name}": quote(str(value), safe="/:.,+@ ")  # headers are ASCII without line ends
            for name, value in values.items()
            if value is not None
        }


def _adapter(drawn: Drawn) -> str:
    return f"{drawn.nickname} in {drawn.component} at {drawn.strength:g} by {drawn.mode}"


def _warnings(asked: Generate, result: Result) -> list[str]:
    """A sentence for each size that differs from the request: pipelines round sizes to what the model supports."""
    made = result.outputs[0]
    return [
        f"{name} is {getattr(made, name)}, not {getattr(asked, name)} as asked: the pipeline rounds it."
        for name in _ROUNDED
        if getattr(asked, name) not in (None, getattr(made, name))
    ]


def base64_of(data: Buffer) -> str:
    return base64.b64encode(data.data).decode("ascii")


def _output(output: Output) -> dict[str, Any]:
    return {
        "b64": base64_of(output.data),
        "format": output.format,
        "seed": output.seed,
        "width": output.width,
        "height": output.height,
        "num_frames": output.num_frames,
        "fps": output.fps,
        "audio_sample_rate": output.audio_sample_rate,
    }
