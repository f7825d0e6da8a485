"""Streams that no trainer sends: they are refused, nothing that they name is touched, and they cost what they weigh."""

from __future__ import annotations

import builtins
import contextlib
import functools
import os
import pickle
import pickletools
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.worker.weights.transport.allowlist import NotAPayload
from safelight.worker.weights.transport.payload import interpret
from safelight.worker.weights.transport.pickled import MAX_BYTES, MAX_DEPTH, MAX_OPCODES, parse
from safelight.worker.weights.transport.rebuild import _Rebuilder

from .streams import (
    FLOAT,
    SIZE,
    START,
    TENSOR,
    UNTYPED,
    called,
    data,
    named,
    nothing_runs,
    number,
    numbers,
    owners,
    pairs,
    reduction,
    refused,
    several,
    storage,
    tensor,
    text,
    unpickle,
)
from .trainer import Trainer


def test_streams_by_hand_are_as_real_ones_unless_something_is_wrong_with_them(segments: Path) -> None:
    with nothing_runs(segments):
        found = interpret(unpickle(pairs(tensor())), ["transformer"])
    assert torch.equal(found["transformer"]["w"], torch.arange(6.0).view(2, 3))
    assert owners(segments) == 1


def test_the_watch_notices_what_pickle_would_do(segments: Path) -> None:
    def would_be(event: Callable[[], object]) -> None:
        with nothing_runs(segments), contextlib.suppress(ImportError):
            event()

    evil = START + called(named("os.path", "exists"), text("/")) + b"."
    for event in (
        lambda: pickle.loads(evil),
        lambda: __import__("this_is_not_there"),
        lambda: (segments.parent / "x").open("w"),
    ):
        with pytest.raises(AssertionError):
            would_be(event)


# --- globals


class Reduced:
    def __init__(self, *reduced: Any) -> None:
        self._reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced

    def __repr__(self) -> str:
        return f"{self._reduced[0].__name__}{self._reduced[1:]}"


class Marked:
    """Would leave a trace if it were made, or given a state."""

    traces: list[str] = []  # noqa: RUF012  what the test looks at

    def __init__(self) -> None:
        self.traces.append("made")

    def __setstate__(self, state: object) -> None:
        self.traces.append("state")


EVIL = [
    Reduced(os.system, ("touch traces",)),
    Reduced(eval, ("1",)),
    Reduced(exec, ("1",)),
    Reduced(getattr, ("", "join")),
    Reduced(builtins.__import__, ("os",)),
    Reduced(functools.partial, (functools.partial, os.system)),
    functools.partial(functools.partial(os.system, "touch traces")),
    Reduced(torch.load, ("traces",)),
    Reduced(torch.Tensor, ()),
    Reduced(torch.UntypedStorage, (1 << 40,)),
    Reduced(torch.Size, ([1, 2],)),
    Reduced(pickle.loads, (b".",)),
    Reduced(Marked, ()),
    Reduced(setattr, ("", "a", 1)),
    torch.device("cpu"),
    {1, 2},
    bytearray(b"a"),
    1.5,
    1 << 80,
    range(3),
    slice(1),
    Ellipsis,
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("evil", EVIL, ids=repr)
def test_what_payloads_do_not_need_is_refused_wherever_it_stands(evil: Any, protocol: int, segments: Path) -> None:
    for payload in (evil, [("w", evil)], {"transformer": [(evil, 1)]}, Reduced(torch.Size, ((evil,),))):
        refused(pickle.dumps(payload, protocol), segments)
    assert Marked.traces == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch", "serialization.load"),
        ("torch.multiprocessing", "reductions.rebuild_tensor"),
        ("torch.multiprocessing.reductions", "os.system"),
        ("torch.multiprocessing.reductions", "rebuild_tensor.__globals__"),
        ("torch.multiprocessing.reductions", "rebuild_nested_tensor"),
        ("torch.multiprocessing.reductions", "rebuild_event"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "storage.UntypedStorage"),
        ("torch.storage", "_load_from_bytes"),
        ("torch", "qint8"),
        ("torch", "float32.__class__"),
        ("torch", "Storage"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "Counter"),
        ("sglang.srt.weight_sync.tensor_bucket", "torch"),
        ("sglang.srt.utils.patch_torch", "torch"),
        ("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified.__globals__"),
        ("", ""),
        ("", "torch.Tensor"),
        ("torch.Tensor", ""),
        ("torch ", "Tensor"),
        ("Torch", "Tensor"),
        ("multiprocessing.resource_sharer", "DupFd"),
    ],
)
def test_the_list_of_globals_is_exact(module: str, name: str, segments: Path) -> None:
    for stream in (named(module, name), f"c{module}\n{name}\n".encode()):
        assert f"the stream names {module + '.' + name!r} at byte" in refused(pairs(stream), segments)


@pytest.mark.parametrize(
    "known",
    [
        reduction("rebuild_tensor"),
        reduction("rebuild_typed_storage"),
        reduction("rebuild_storage_filename"),
        reduction("rebuild_storage_empty"),
        reduction("rebuild_cuda_tensor"),
        named("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified"),
        TENSOR,
        SIZE,
        UNTYPED,
        named("torch.storage", "TypedStorage"),
        named("torch.nn.parameter", "Parameter"),
        named("collections", "OrderedDict"),
        named("_codecs", "encode"),
        named("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"),
        named("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorBucket"),
    ],
)
def test_a_known_global_cannot_be_used_to_call_anything_else(known: bytes, segments: Path) -> None:
    """Neither as a value, nor called as torch does not call it, nor around another call, nor called twice."""
    for args in (
        [],
        [text("a")],
        [number(1 << 62)],
        [TENSOR],
        [tensor()],
        [text("os"), text("system")],
        [TENSOR, numbers(1), numbers(1)],
        [b"]"],
        [several(several(several()))],
    ):
        assert refused(pairs(called(known, *args)), segments)
        assert refused(pairs(called(called(known, *args), *args)), segments)
        assert refused(pairs(called(known, called(known, *args))), segments)
    assert refused(pairs(known), segments)
    assert refused(pairs(known + b"]R"), segments)


# --- opcodes

KNOWN_OPCODES = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE BINUNICODE
SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD""".split()  # noqa: SIM905


@pytest.mark.parametrize("opcode", pickletools.opcodes, ids=lambda opcode: opcode.name)
def test_other_opcodes_are_refused_by_name_before_they_are_read(opcode: Any, segments: Path) -> None:
    stream = START + b"]N" + opcode.code.encode("latin1") + b"\1\0\0\0\0\0\0\0a\nb\n."
    refusal = f"the opcode {opcode.name} at byte 4 does not occur in payloads"
    assert (refused(stream, segments) == refusal) is (opcode.name not in KNOWN_OPCODES)


def test_a_byte_that_is_not_an_opcode_is_refused(segments: Path) -> None:
    for code in set(range(256)) - {ord(opcode.code) for opcode in pickletools.opcodes}:
        assert refused(START + bytes([code]) + b".", segments).startswith(
            f"the opcode {code:#04x} at byte 2 does not occur in payloads"
        )


METADATA = named("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata")
BUCKET = named("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorBucket")
ENCODE = named("_codecs", "encode")
STATE = b"}(" + text("flattened_tensor") + b"N" + text("metadata") + b"]u"


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"", "not a pickle of protocol 2 to 5"),
        (b"]q\0.", "not a pickle of protocol 2 to 5"),
        (b"\x80", "PROTO at byte 0 is cut off"),
        (b"\x80\1].", "PROTO at byte 0 does not begin"),
        (b"\x80\6].", "PROTO at byte 0 does not begin"),
        (START + START + b"].", "PROTO at byte 2 does not begin"),
        (START, "cut off at byte 2"),
        (START + b".", "STOP at byte 2 does not end the stream with one value"),
        (START + b"]].", "STOP at byte 4 does not end the stream with one value"),
        (START + b"].N", "STOP at byte 3 does not end the stream with one value"),
        (START + b"](.", "STOP at byte 4 does not end the stream with one value"),
        (START + b"\x95\3\0\0\0\0\0\0\0].", "FRAME at byte 2 is cut off"),
        (START + b"\x95\xff\xff\xff\xff\xff\xff\xff\xff].", "FRAME at byte 2 is cut off"),
        (START + b"\x94.", "MEMOIZE at byte 2 finds too few values"),
        (START + b"]q\1.", "BINPUT at byte 3 puts out of order"),
        (START + b"]r\xff\xff\xff\xff.", "LONG_BINPUT at byte 3 puts out of order"),
        (START + b"]\x94h\1.", "BINGET at byte 4 gets 1, which was not put"),
        (START + b"]\x94j\xff\xff\xff\xff.", "LONG_BINGET at byte 4 gets 4294967295, which was not put"),
        (START + b"Nt.", "TUPLE at byte 3 finds no mark"),
        (START + b"N\x86.", "TUPLE2 at byte 3 finds too few values"),
        (START + b"N(N\x86.", "TUPLE2 at byte 5 finds too few values"),
        (START + b"(e.", "APPENDS at byte 3 finds too few values"),
        (START + b"}Na.", "APPEND at byte 4 is applied to a dict"),
        (START + b")(Ne.", "APPENDS at byte 5 is applied to a tuple"),
        (START + b"]NNs.", "SETITEM at byte 5 is applied to a list"),
        (START + b"}NNs.", "SETITEM at byte 5 has a key of type NoneType"),
        (START + b"}" + TENSOR + b"Ns.", "has a key of type Known"),
        (START + b"}(" + text("a") + b"u.", "SETITEMS at byte 10 has a key without a value"),
        (START + b"}(" + text("a") + b"N" + text("a") + b"Nu.", "SETITEMS at byte 18 has the key 'a' twice"),
        (START + text("os") + b"N\x93.", "STACK_GLOBAL at byte 10 names no global"),
        (START + b"\x93.", "STACK_GLOBAL at byte 2 finds too few values"),
        (START + b"cos\n", "GLOBAL at byte 2 is cut off"),
        (START + b"cos" + b"a" * 5000 + b"\n\n.", "GLOBAL at byte 2 is cut off"),
        (START + b"c\xff\nb\n.", "GLOBAL at byte 2 is not valid UTF-8"),
        (START + text("print") + b")R.", "REDUCE at byte 13 calls something other than a function"),
        (START + FLOAT + b")R.", "calls something other than a function"),
        (START + SIZE + b"]R.", "function with a tuple of arguments"),
        (START + TENSOR + b")\x81.", "NEWOBJ at byte 25 makes something other than a bucket or its metadata"),
        (START + b"])\x81.", "NEWOBJ at byte 4 makes something other than a bucket or its metadata"),
        (START + BUCKET + b"N\x85\x81.", "makes something other than a bucket or its metadata"),
        (START + BUCKET + b")\x81.", "FlattenedTensorBucket at byte 71 has no attributes"),
        (START + BUCKET + b")\x81}b.", "does not give sglang.srt.weight_sync.tensor_bucket.FlattenedTensorBucket its"),
        (START + METADATA + b")\x81" + STATE + b"b.", "FlattenedTensorMetadata its attributes"),
        (START + BUCKET + b")\x81" + STATE + b"b" + STATE + b"b.", "FlattenedTensorBucket its attributes"),
        (START + BUCKET + b")\x81Nb.", "FlattenedTensorBucket its attributes"),
        (START + BUCKET + STATE + b"b.", "BUILD at byte 109 is applied to a Known"),
        (START + b"]" + STATE + b"b.", "BUILD at byte 42 is applied to a list"),
        (START + TENSOR + STATE + b"b.", "is applied to a Known"),
        (START + b"X\xff\xff\xff\xffa.", "BINUNICODE at byte 2 has 4294967295 bytes; 4096 are allowed"),
        (START + b"B\xff\xff\xff\x7fa.", "BINBYTES at byte 2 has 2147483647 bytes; 4096 are allowed"),
        (START + text("a" * 4097) + b".", "BINUNICODE at byte 2 has 4097 bytes; 4096 are allowed"),
        (START + b"\x8c\1\xff.", "SHORT_BINUNICODE at byte 2 is not valid UTF-8"),
        (START + b"\x8a\x09" + bytes(9) + b".", "LONG1 at byte 2 is an integer of more than 8 bytes"),
        (START + b"\x8a\xff" + bytes(9) + b".", "LONG1 at byte 2 is an integer of more than 8 bytes"),
        (START + b"(" * (MAX_DEPTH + 1) + b".", "MARK at byte 34 is nested too deeply"),
        (START + b"]" + data(b"a") + b"a.", "the payload has bytes in place of a value"),
        (START + called(ENCODE, text("€"), text("latin1")) + b".", "_codecs.encode, called at byte"),
        (START + called(ENCODE, text("a"), text("utf-8")) + b".", "_codecs.encode, called at byte"),
    ],
)  # fmt: skip
def test_what_the_machine_cannot_do_is_refused_with_its_place(stream: bytes, reason: str, segments: Path) -> None:
    assert reason in refused(stream, segments)


# --- size


def test_deep_nesting_is_refused_and_never_recursed_into(segments: Path) -> None:
    for depth in (MAX_DEPTH, MAX_DEPTH + 1, 100_000):
        for nested in (b"]" * depth + b"a" * (depth - 1), b")" + b"\x85" * (depth - 1)):
            if depth == MAX_DEPTH:
                assert unpickle(START + nested + b".") != ()
            else:
                assert refused(START + nested + b".", segments) == f"the payload is nested more than {MAX_DEPTH} deep"


FIELDS = ("name", "shape", "dtype", "start_idx", "end_idx", "numel")


@pytest.mark.parametrize(
    "circle",
    [
        b"]\x94h\0a.",
        b"}\x94" + text("a") + b"h\0s.",
        b"]\x94h\0\x85a.",
        b"]\x94" + METADATA + b")\x81}(" + b"".join(text(field) + b"h\0" for field in FIELDS) + b"uba.",
    ],
)
def test_a_value_that_contains_itself_is_refused(circle: bytes, segments: Path) -> None:
    assert refused(START + circle, segments) == "the payload contains itself"


def test_a_value_that_is_contained_often_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of pairs of … 30 times: 2 to the power of 30 values for who counts them."""
    made: list[int] = []
    make = _Rebuilder._make

    def counted(self: _Rebuilder, node: Any, depth: int) -> Any:
        made.append(depth)
        return make(self, node, depth)

    monkeypatch.setattr(_Rebuilder, "_make", counted)
    bomb = b")" + b"".join(b"\x94h%c\x86" % n for n in range(30))
    with pytest.raises(NotAPayload, match="entry 0 of transformer is not a pair"):
        interpret(unpickle(START + bomb + b"."), ["transformer"])
    assert len(made) == 31


def test_a_tensor_that_is_contained_often_is_opened_once(segments: Path) -> None:
    stream = (
        START
        + b"]("
        + several(text("v"), tensor() + b"\x94")
        + b"".join(several(text(f"{n}"), b"h\0") for n in range(100))
    )
    found = interpret(unpickle(stream + b"e."), ["transformer"])["transformer"]
    assert len(found) == 101
    assert owners(segments) == 1


@pytest.mark.parametrize(
    "bomb",
    [
        ENCODE + b"\x94" + several(text("a" * 256), text("latin1")) + b"\x94",
        ENCODE + b"\x94" + several(text("a" * 4096), text("latin1")) + b"\x94",
    ],
)
def test_calls_make_no_more_than_a_little_each(bomb: bytes) -> None:
    """A call of two memoised values is five bytes of the stream."""
    calls = 20_000
    stream = START + b"(" + bomb + b"h\0h\1R" * calls + b"t."
    assert _peak(lambda: parse(stream)) < 600 * calls


def _peak(run: Any) -> int:
    """The bytes that are allocated at most."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [b"X\xff\xff\xff\xff", b"B\xff\xff\xff\xff", b"\x8a\xff", b"\x8c\xff", b"C\xff"])
def test_a_giant_length_allocates_nothing(length: bytes) -> None:
    def read() -> None:
        with pytest.raises(NotAPayload):
            parse(START + length + b"a.")

    read()
    assert _peak(read) < 50_000


@pytest.mark.parametrize("opcodes", [b"]", b"}", b"N", b")", b"K\1", b"\x8a\0", b"\x8c\0", b"C\0", b"]\x94", b"(]t"])
def test_every_opcode_makes_a_little(opcodes: bytes) -> None:
    stream = START + opcodes * 20_000 + b"."

    def read() -> None:
        with pytest.raises(NotAPayload):
            parse(stream)

    assert _peak(read) < 250 * len(stream)


def test_a_stream_is_limited_in_bytes_and_opcodes(segments: Path) -> None:
    assert f"has {MAX_BYTES + 1} bytes" in refused(START + bytes(MAX_BYTES - 1), segments)
    assert f"more than {MAX_OPCODES} opcodes" in refused(START + b"N" * MAX_OPCODES, segments)


def test_the_limits_leave_room_for_the_tensors_of_any_model(segments: Path) -> None:
    """15,000 of them with long names, in one storage."""
    shared = storage() + b"\x94"
    each = (several(text(f"transformer.blocks.{n}.attention.{'x' * 60}"), tensor(shared=b"h\0")) for n in range(15_000))
    found = interpret(
        unpickle(START + b"](" + several(text("w"), tensor(shared=shared)) + b"".join(each) + b"e."), ["vae"]
    )
    assert len(found["vae"]) == 15_001


# --- what is broken


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("what", ["modules", "object", "plain bytes", "cuda", "no tensors"])
def test_a_stream_that_is_cut_off_anywhere_is_refused(
    what: str, protocol: int, trainer: Trainer, segments: Path
) -> None:
    stream = trainer.stream(what, protocol=protocol)
    for end in range(len(stream)):
        assert "cut off" in refused(stream[:end], segments) or end == 0


def test_random_bytes_are_refused(segments: Path) -> None:
    chance = random.Random(0)
    opcodes = [ord(opcode.code) for opcode in pickletools.opcodes if opcode.name in KNOWN_OPCODES]
    for _ in range(3000):
        refused(START + chance.randbytes(chance.randrange(60)), segments)
        refused(START + bytes(chance.choices(opcodes, k=chance.randrange(60))) + b"\xff", segments)
