"""Real streams, changed thousands of times: they are read or refused, and nothing else happens."""

from __future__ import annotations

import random
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from safelight.tests.effort import chosen, examples
from safelight.worker.weights.transport import allowlist as allowed
from safelight.worker.weights.transport import payload, pickled
from safelight.worker.weights.transport import rebuild as received
from safelight.worker.weights.transport import shm_segment as segment
from safelight.worker.weights.transport.allowlist import NotAPayload
from safelight.worker.weights.transport.payload import interpret

from .fuzzing import Coverage, changed, tokens
from .streams import MANAGER, nothing_runs, unpickle
from .trainer import UUID, Trainer

ROUNDS = examples(25, 250)
MODULES = ["transformer"]
SENT = ("one", "elements", "plain bytes", "object", "cuda", "cuda by uuid", "cuda empty", "no tensors")


@pytest.fixture
def corpus(trainer: Trainer, segments: Path) -> list[bytes]:
    """Streams of every kind; each of their segments is copied, and has more owners than there will be readers."""
    streams = [_renamed(trainer.stream(what, protocol=protocol), segments) for what in SENT for protocol in (2, 4)]
    (segments / "torch_7_8_9").write_bytes(bytes(80_064))
    trainer.forget()
    return streams


def _renamed(stream: bytes, segments: Path) -> bytes:
    """The stream with segments and managers that are called the same every time."""
    pieces = tokens(stream)
    for index, piece in enumerate(pieces):
        name = piece[5:] if piece[:1] == b"X" else piece[2:]
        if name.startswith(b"/torch_") and name != b"/torch_7_8_9":
            memory = (Path("/dev/shm") / name[1:].decode()).read_bytes()
            name = b"/torch_1_1_%d" % len(list(segments.iterdir()))
            (segments / name[1:].decode()).write_bytes(struct.pack("<i", 1 << 30) + memory[4:])
        elif name.endswith(b"/manager.sock"):
            name = MANAGER
        else:
            continue
        pieces[index] = piece[:1] + len(name).to_bytes(4 if piece[:1] == b"X" else 1, "little") + name
    if pieces[1][:1] == b"\x95":
        pieces[1] = b"\x95" + sum(map(len, pieces[2:])).to_bytes(8, "little")
    return b"".join(pieces)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The handles that torch is asked to open, on two GPUs."""
    asked: list[tuple[Any, ...]] = []
    properties = [SimpleNamespace(uuid="other"), SimpleNamespace(uuid=UUID)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *args: asked.append(args) or torch.zeros(3))
    return asked


@pytest.mark.parametrize("seed", chosen(7, nightly=[8, 9, 10]))
def test_a_changed_stream_is_read_or_refused_and_nothing_else(
    seed: int, corpus: list[bytes], opened: list[tuple[Any, ...]], segments: Path
) -> None:
    chance = random.Random(seed)
    coverage = Coverage((allowed, payload, pickled, received, segment))
    largest = max(path.stat().st_size for path in segments.iterdir())
    read, refusals = 0, set[str]()

    def run(stream: bytes) -> bool:
        """True if it reached new code."""
        nonlocal read
        steps, lines = len(coverage.steps), coverage.lines
        try:
            with coverage.watching():
                found = interpret(unpickle(stream), MODULES)
        except NotAPayload as error:
            refusals.add(re.sub(r"\d+|'.*'", "…", str(error)))
        else:
            read += 1
            assert list(found) == MODULES
            for name, tensor in found["transformer"].items():
                assert type(name) is str
                assert tensor.untyped_storage().nbytes() <= largest
                tensor.clone()  # reads all of it
        assert coverage.lines - lines < 60 * len(stream) + 1000
        return len(coverage.steps) > steps

    for stream in corpus:
        run(stream)
    assert read == len(corpus)
    real, given = len(coverage.steps), len(corpus)
    for _ in range(ROUNDS):
        streams = [changed(chance.choice(corpus), corpus, chance) for _ in range(100)]
        with nothing_runs(segments):
            corpus += [stream for stream in streams if run(stream)]
    assert len(coverage.steps) > real + 80
    assert len(refusals) > 100
    assert read > given
    assert len(corpus) > given + 30
    assert opened
    for asked in opened:
        assert asked[6] in (0, 1)
        assert asked[7] is None or (type(asked[7]) is bytes and len(asked[7]) == 66 and asked[11] == b"/torch_7_8_9")
