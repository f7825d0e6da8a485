"""Pictures of requests, decoded in a few processes of their own, which are killed when one takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from ..protocol.errors import InvalidRequest, QueueFull, SafelightError, Unavailable, from_info
from ..protocol.generation import Image
from .decoder import Decoded, DecodingTask, as_images, receive, send

PROCESSES = 2
MAX_WAITING = 32
"""Requests whose pictures are decoded or wait for that; one more gets a 429."""

CPU_S = 10.0
"""Seconds of CPU time that the pictures of a request may take. The largest take about one."""

WALL_S = 60.0
"""Seconds after which a process is killed that says nothing, as one that is stopped uses no CPU time."""


class PictureDecoding:
    """Starts its processes when pictures come; each ends with this one, whose pipe it reads."""

    def __init__(self, *, cpu_s: float = CPU_S, wall_s: float = WALL_S) -> None:
        self._cpu_s = cpu_s
        self._wall_s = wall_s
        self._threads = ThreadPoolExecutor(PROCESSES, thread_name_prefix="pictures")
        self._own = threading.local()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._waiting = 0

    async def read(self, sources: Sequence[str | bytes], max_pixels: int) -> list[Image]:
        """As :func:`.images.read_images`. Raises ``QueueFull`` and ``Unavailable`` too."""
        if self._waiting >= MAX_WAITING:
            raise QueueFull(f"The pictures of {self._waiting} requests are being decoded already.")
        self._waiting += 1
        working = asyncio.get_running_loop().run_in_executor(self._threads, self._read, sources, max_pixels)
        working.add_done_callback(self._one_less)  # also where nobody waits for it any more
        return await working

    def close(self) -> None:
        """End all processes, whatever they are at: this process cannot end before the threads that wait for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in list(self._running):
            decoder.kill()

    def _one_less(self, working: asyncio.Future[list[Image]]) -> None:
        self._waiting -= 1

    def _read(self, sources: Sequence[str | bytes], max_pixels: int) -> list[Image]:
        texts = [source for source in sources if isinstance(source, str)]
        files = [source for source in sources if isinstance(source, bytes)]
        decoder = self._decoder()
        reply = self._ask(decoder, DecodingTask(texts, files, max_pixels, self._cpu_s))
        if not reply:
            raise self._reason(decoder)
        decoded = msgspec.msgpack.decode(reply, type=Decoded)
        if decoded.error is not None:
            raise from_info(decoded.error)
        return as_images(decoded)

    def _ask(self, decoder: subprocess.Popen[bytes], task: DecodingTask) -> bytes:
        """The reply to ``task``, or nothing where the process ends without one."""
        assert decoder.stdin is not None
        assert decoder.stdout is not None
        overdue = threading.Timer(self._wall_s, decoder.kill)
        overdue.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                send(decoder.stdin, msgspec.msgpack.encode(task))
                return receive(decoder.stdout)
            return b""
        finally:
            overdue.cancel()

    def _reason(self, decoder: subprocess.Popen[bytes]) -> SafelightError:
        decoder.kill()
        status = decoder.wait()
        self._running.discard(decoder)
        if status == -signal.SIGPROF:
            return InvalidRequest(f"The images take more than {self._cpu_s:g} s to decode.", field="image")
        if status == -signal.SIGKILL:
            return Unavailable("The process that decodes images was killed; send the request again.")
        return InvalidRequest("The images cannot be decoded: the library that reads them crashes.", field="image")

    def _decoder(self) -> subprocess.Popen[bytes]:
        """This thread's process, started again when it was killed."""
        running: subprocess.Popen[bytes] | None = vars(self._own).get("process")
        if running is None or running.poll() is not None:
            running = self._own.process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.decoder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={name: value for name, value in os.environ.items() if name != "SAFELIGHT_API_KEY"},
                process_group=0,  # so that Ctrl-C in a terminal reaches the server alone
            )
            self._running.add(running)
        return running
