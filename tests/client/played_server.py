"""A server that answers from a script: what is tested against it is what the client makes of the answers."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from PIL import Image


@dataclass(frozen=True)
class Reply:
    """One scripted answer. ``chunks`` are sent one by one; ``hang`` then waits for the client to go away."""

    status: int = 200
    chunks: tuple[bytes, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    cut: bool = False
    """End without the closing chunk, as a server does that dies."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class PlayedServer:
    """Plays ``replies`` in order, the last one for ever; ``requests`` is what came."""

    def __init__(self, *replies: Reply) -> None:
        self.requests: list[Request] = []
        self.client_gone = threading.Event()
        self._replies = list(replies)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def take(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            return self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(server: PlayedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            reply = server.take(Request(self.command, self.path, headers, json.loads(content) if content else None))
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for chunk in reply.chunks:
                self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                self.wfile.flush()
            if reply.hang and self.rfile.read(1) == b"":  # the end of input is the client's going
                server.client_gone.set()
            if reply.hang or reply.cut:
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_: object) -> None: ...

    return Handler


def png(colour: str = "red", side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, format="PNG")
    return file.getvalue()


def generation(*seeds: int, data: bytes | None = None, format: str = "png") -> dict[str, Any]:
    """The body of a successful answer, as the wire contract has it."""
    encoded = base64.b64encode(png() if data is None else data).decode()
    output = {"b64": encoded, "format": format, "width": 8, "height": 8, "num_frames": None, "fps": None}
    return {
        "id": "r1",
        "model": "shapes",
        "weight_version": "initial",
        "outputs": [{**output, "seed": seed} for seed in seeds or (7,)],
        "timings": {"queue_s": 0.0, "encode_s": 0.1, "denoise_s": 0.2, "decode_s": 0.1, "total_s": 0.4},
        "steps": 4,
    }


def json_reply(body: Any, status: int = 200, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, (json.dumps(body).encode(),), {"content-type": "application/json", **named})


def error_reply(status: int, code: str, message: str = "No.", **headers: str) -> Reply:
    error = {"code": code, "message": message, "field": None, "request_id": "r1"}
    return json_reply({"error": error}, status, **headers)


def event(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def event_reply(*events: bytes, hang: bool = False, cut: bool = False) -> Reply:
    return Reply(200, events, {"content-type": "text/event-stream"}, hang, cut)


Draw = Callable[..., Any]
"""``draw(server, prompt, **arguments)`` with one of the two clients."""
