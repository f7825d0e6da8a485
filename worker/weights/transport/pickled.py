"""Reads the ``ForkingPickler`` streams that trainers send, without running anything that they name.

The stream is interpreted symbolically: opcodes become plain values, each call an inert :class:`PickledCall`.
After the whole stream, :mod:`.rebuild` checks the arguments of the calls exactly, and makes tensors of them.
Only the opcodes, globals and calls of real streams of protocols 2 to 5 are accepted (torch 2.x,
``torch.multiprocessing.reductions``). Every opcode makes at most one small value, so the number of opcodes bounds
memory and time. docs/decisions/0018 says why this is not ``pickle.Unpickler``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pickletools import opcodes
from typing import Any, NoReturn

from .allowlist import DTYPES, FIELDS, KNOWN, REFUSED, Known, NotAPayload

MAX_BYTES = 16 << 20  # a tensor takes about 150 bytes and 60 opcodes
MAX_OPCODES = 1 << 20
MAX_TEXT = 4096  # of one str or bytes
MAX_HANDLE = 256  # of bytes that are written as str
MAX_DEPTH = 32


@dataclass(frozen=True, slots=True, eq=False)
class PickledCall:
    """A call that the stream makes. Errors name it ``origin``."""

    function: Known
    args: tuple[Any, ...]
    origin: str


@dataclass(slots=True, eq=False)
class Instance:
    """An object of ``cls`` made at byte ``at``; a later opcode sets its attributes ``state``."""

    cls: Known
    at: int
    state: dict[str, Any] | None = None


def parse(stream: bytes) -> Any:
    """``None``, bool, int, str, bytes, dtypes, :class:`Known`, :class:`PickledCall`, :class:`Instance`, and lists,
    tuples and dicts (with str keys) of them, which may share values and contain themselves.

    Raises :class:`NotAPayload`.
    """
    return _Machine(stream).run()


class _Machine:
    """pickle's stack machine, with its memo and its marks."""

    def __init__(self, stream: bytes) -> None:
        if len(stream) > MAX_BYTES:
            raise NotAPayload(f"the stream has {len(stream)} bytes; {MAX_BYTES} are allowed")
        self._stream = stream
        self._next = 0  # the next byte to read
        self._at = 0  # the byte of the current opcode
        self._stack: list[Any] = []
        self._memo: list[Any] = []
        self._marks: list[int] = []

    def run(self) -> Any:
        if self._stream[:1] != b"\x80":
            raise NotAPayload("the stream is not a pickle of protocol 2 to 5")
        for _ in range(MAX_OPCODES):
            self._at = self._next
            if self._at == len(self._stream):
                raise NotAPayload(f"the stream is cut off at byte {self._at}")
            code = self._take(1)[0]
            if code == ord("."):
                return self._stop()
            if code not in _OPCODES:
                self._refuse("does not occur in payloads")
            act, option = _OPCODES[code]
            act(self, option)
        raise NotAPayload(f"the stream has more than {MAX_OPCODES} opcodes")

    def _stop(self) -> Any:
        if self._next != len(self._stream) or self._marks or len(self._stack) != 1:
            self._refuse("does not end the stream with one value")
        return self._stack[0]

    def _refuse(self, reason: str) -> NoReturn:
        code = self._stream[self._at]
        name = next((opcode.name for opcode in opcodes if ord(opcode.code) == code), f"{code:#04x}")
        raise NotAPayload(f"the opcode {name} at byte {self._at} {reason}")

    def _take(self, count: int) -> bytes:
        start, self._next = self._next, self._next + count
        if self._next > len(self._stream):
            self._refuse("is cut off")
        return self._stream[start : self._next]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _pop(self, count: int) -> list[Any]:
        """The top ``count`` values, which must be above the last mark."""
        start = len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            self._refuse("finds too few values")
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _pop_mark(self) -> list[Any]:
        if not self._marks:
            self._refuse("finds no mark")
        values = self._pop(len(self._stack) - self._marks[-1])
        self._marks.pop()
        return values

    def _top(self, kind: type) -> Any:
        """The topmost value, which must be of ``kind``; it stays on the stack."""
        (value,) = self._pop(1)
        if type(value) is not kind:
            self._refuse(f"is applied to a {type(value).__name__}")
        self._stack.append(value)
        return value

    def protocol(self, _: None) -> None:
        if self._at != 0 or not 2 <= self._number(1) <= 5:
            self._refuse("does not begin a stream of protocol 2 to 5")

    def frame(self, _: None) -> None:
        if self._number(8) > len(self._stream) - self._next:
            self._refuse("is cut off")

    def constant(self, value: Any) -> None:
        self._stack.append(value)

    def new(self, kind: type) -> None:
        self._stack.append(kind())

    def integer(self, size: int) -> None:
        self._stack.append(self._number(size))

    def signed(self, size: int) -> None:
        """A number of ``size`` bytes; if that is 0, the next byte is its size, at most 8."""
        size = size or self._number(1)
        if size > 8:
            self._refuse("is an integer of more than 8 bytes")
        self._stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def data(self, size: int) -> None:
        length = self._number(size)
        if length > MAX_TEXT:
            self._refuse(f"has {length} bytes; {MAX_TEXT} are allowed")
        self._stack.append(self._take(length))

    def text(self, size: int) -> None:
        self.data(size)
        self._stack.append(self._decoded(self._stack.pop()))

    def _decoded(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._refuse("is not valid UTF-8")

    def mark(self, _: None) -> None:
        if len(self._marks) == MAX_DEPTH:
            self._refuse("is nested too deeply")
        self._marks.append(len(self._stack))

    def make_tuple(self, count: int | None) -> None:
        self._stack.append(tuple(self._pop_mark() if count is None else self._pop(count)))

    def append(self, count: int | None) -> None:
        values = self._pop_mark() if count is None else self._pop(count)
        self._top(list).extend(values)

    def set_items(self, count: int | None) -> None:
        values = self._pop_mark() if count is None else self._pop(count)
        items = self._top(dict)
        if len(values) % 2:
            self._refuse("has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str:
                self._refuse(f"has a key of type {type(key).__name__}")
            if key in items:
                self._refuse(f"has the key {key!r} twice")
            items[key] = value

    def put(self, size: int) -> None:
        """Real streams number memo entries consecutively, so the memo is a list."""
        if size and self._number(size) != len(self._memo):
            self._refuse("puts out of order")
        self._memo.extend(self._pop(1))
        self._stack.append(self._memo[-1])

    def get(self, size: int) -> None:
        index = self._number(size)
        if index >= len(self._memo):
            self._refuse(f"gets {index}, which was not put")
        self._stack.append(self._memo[index])

    def global_lines(self, _: None) -> None:
        end = self._stream.find(b"\n", self._next, self._next + MAX_TEXT) + 1
        end = self._stream.find(b"\n", end, end + MAX_TEXT) + 1 if end else 0
        if not end:
            self._refuse("is cut off")
        module, name, _rest = self._decoded(self._take(end - self._next)).split("\n")
        self._global(module, name)

    def global_stack(self, _: None) -> None:
        module, name = self._pop(2)
        if type(module) is not str or type(name) is not str:
            self._refuse("names no global")
        self._global(module, name)

    def _global(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full in REFUSED:
            raise NotAPayload(f"the stream names {full} at byte {self._at}: {REFUSED[full]}")
        if "." in name or (full not in DTYPES and full not in KNOWN):
            raise NotAPayload(f"the stream names {full!r} at byte {self._at}, which no payload needs")
        self._stack.append(DTYPES.get(full) or KNOWN[full])

    def reduce(self, _: None) -> None:
        function, args = self._pop(2)
        if type(function) is not Known or type(args) is not tuple:
            self._refuse("calls something other than a function with a tuple of arguments")
        match function, args:
            case Known.ORDERED_DICT, ():
                self._stack.append({})
            case Known.ENCODE, (str(text), "latin1") if len(text) <= MAX_HANDLE and max(text, default="") <= "\xff":
                self._stack.append(text.encode("latin1"))
            case _:
                self._stack.append(PickledCall(function, args, f"{function.value}, called at byte {self._at},"))

    def instance(self, _: None) -> None:
        cls, args = self._pop(2)
        if type(cls) is not Known or cls not in FIELDS or args != ():
            self._refuse("makes something other than a bucket or its metadata")
        self._stack.append(Instance(cls, self._at))

    def build(self, _: None) -> None:
        (state,) = self._pop(1)
        instance = self._top(Instance)
        if instance.state is not None or type(state) is not dict or state.keys() != FIELDS[instance.cls]:
            self._refuse(f"does not give {instance.cls.value} its attributes")
        instance.state = dict(state)


_OPCODES: dict[int, tuple[Callable[[_Machine, Any], None], Any]] = {
    0x80: (_Machine.protocol, None),  # PROTO
    0x95: (_Machine.frame, None),  # FRAME
    ord("N"): (_Machine.constant, None),  # NONE
    0x88: (_Machine.constant, True),  # NEWTRUE
    0x89: (_Machine.constant, False),  # NEWFALSE
    ord(")"): (_Machine.constant, ()),  # EMPTY_TUPLE
    ord("]"): (_Machine.new, list),  # EMPTY_LIST
    ord("}"): (_Machine.new, dict),  # EMPTY_DICT
    ord("K"): (_Machine.integer, 1),  # BININT1
    ord("M"): (_Machine.integer, 2),  # BININT2
    ord("J"): (_Machine.signed, 4),  # BININT
    0x8A: (_Machine.signed, 0),  # LONG1
    0x8C: (_Machine.text, 1),  # SHORT_BINUNICODE
    ord("X"): (_Machine.text, 4),  # BINUNICODE
    ord("C"): (_Machine.data, 1),  # SHORT_BINBYTES
    ord("B"): (_Machine.data, 4),  # BINBYTES
    ord("("): (_Machine.mark, None),  # MARK
    ord("t"): (_Machine.make_tuple, None),  # TUPLE
    0x85: (_Machine.make_tuple, 1),  # TUPLE1
    0x86: (_Machine.make_tuple, 2),  # TUPLE2
    0x87: (_Machine.make_tuple, 3),  # TUPLE3
    ord("a"): (_Machine.append, 1),  # APPEND
    ord("e"): (_Machine.append, None),  # APPENDS
    ord("s"): (_Machine.set_items, 2),  # SETITEM
    ord("u"): (_Machine.set_items, None),  # SETITEMS
    0x94: (_Machine.put, 0),  # MEMOIZE
    ord("q"): (_Machine.put, 1),  # BINPUT
    ord("r"): (_Machine.put, 4),  # LONG_BINPUT
    ord("h"): (_Machine.get, 1),  # BINGET
    ord("j"): (_Machine.get, 4),  # LONG_BINGET
    ord("c"): (_Machine.global_lines, None),  # GLOBAL
    0x93: (_Machine.global_stack, None),  # STACK_GLOBAL
    ord("R"): (_Machine.reduce, None),  # REDUCE
    0x81: (_Machine.instance, None),  # NEWOBJ
    ord("b"): (_Machine.build, None),  # BUILD
}
