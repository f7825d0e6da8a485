"""A stand-in for the scheduler: it speaks the protocol over a real socket, and the test decides what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Self

import zmq
import zmq.asyncio

from safelight.protocol.codec import Buffer
from safelight.protocol.generation import Cancel, Generate, GenerateCopies, Output, Queued, Result, Started, Timings
from safelight.protocol.messages import FROM_SCHEDULER, TO_SCHEDULER, FromScheduler, ToScheduler
from safelight.protocol.replicas import Batching, ModelInfo, Parameter, ReplicaStatus, Status
from safelight.protocol.rollouts import RolledOut

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)

ARGUMENTS = {
    "prompt_2": Parameter(["str", "list", "null"]),
    "negative_prompt": Parameter(["str", "null"]),
    "width": Parameter(["int", "null"]),
    "height": Parameter(["int", "null"]),
    "num_inference_steps": Parameter(["int"], 28),
    "guidance_scale": Parameter(["float"], 3.5),
    "max_sequence_length": Parameter(["int"], 512),
    "sigmas": Parameter(["list", "null"]),
    "joint_attention_kwargs": Parameter(["dict", "null"]),
    "guidance_rescale": Parameter(["float"], 0.0),
}

IMAGE_MODEL = ModelInfo(
    model="tiny",
    path="/models/tiny",
    pipeline="TinyPipeline",
    kind="image",
    device="cpu",
    dtype="float32",
    parameters={"transformer": 10},
    arguments=ARGUMENTS,
    size_multiple=16,
    default_width=64,
    default_height=64,
    no_image="none fits",
    batching=Batching("merged", "because"),
    weight_version="7",
)


def ready(model: ModelInfo = IMAGE_MODEL) -> Status:
    return Status(0, 0, [ReplicaStatus(replica=0, state="ready", message="ready", pid=1, model=model)])


def finished(generate: Generate, data: bytes = PNG) -> list[FromScheduler]:
    """Everything that a request which goes well brings about."""
    request_id = generate.request_id
    rolled_out = None if generate.rollout is None else RolledOut(reply={}, tensors=[])
    outputs = [
        Output(Buffer(data), generate.output_format, sample.seed, 64, 48, rolled_out=rolled_out)
        for sample in generate.samples
    ]
    result = Result(request_id, outputs, Timings(0.1, 0.2, 0.3, 0.4, 1.0), 4, "7", weight_versions=["7"])
    return [Queued(request_id, 0), Started(request_id, 0, 0.1), result] if generate.progress else [result]


class PlayedScheduler:
    """A context. Answers each ``Generate``, or copy of one, with what ``answer`` gives, all else with ``operated``.

    ``received`` is all that came.
    """

    def __init__(self, directory: Path, answer: Callable[[Generate], list[FromScheduler]] = finished) -> None:
        self.address = f"ipc://{directory}/frontend"
        self.answer = answer
        self.operated: Callable[[ToScheduler], list[FromScheduler]] = lambda _: []
        self.received: list[ToScheduler] = []
        self._server = b""

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(self.address)
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=0)

    def generates(self) -> list[Generate]:
        return [message for message in self.received if isinstance(message, Generate)]

    def cancelled(self) -> list[str]:
        return [message.request_id for message in self.received if isinstance(message, Cancel) and message.request_id]

    async def say(self, message: FromScheduler) -> None:
        await self._socket.send_multipart([self._server, *FROM_SCHEDULER.encode(message)])

    async def _run(self) -> None:
        while True:
            self._server, *frames = await self._socket.recv_multipart()
            message = TO_SCHEDULER.decode(frames)
            self.received.append(message)
            for event in self._answers(message):
                await self.say(event)

    def _answers(self, message: ToScheduler) -> list[FromScheduler]:
        match message:
            case Generate():
                return self.answer(message)
            case GenerateCopies(request=request, replicas=replicas):
                return [event for _ in replicas for event in self.answer(request)]
            case _:
                return self.operated(message)
