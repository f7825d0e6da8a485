"""Server-sent events, wherever the network cuts them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.client.event_stream import EventDecoder, ServerSentEvent

STREAM = (
    "\ufeff: a comment\r\n"
    "event: queued\r\ndata: {}\r\n\r\n"
    "id: 3\nevent: progress\ndata: erste\ndata:  zweite Zeile: grün ☂\n\n"
    "data\rdata: after an empty line\r\r"
    "event: forgotten\n\n"
    "data: no name\nretry: 10\n\n"
    "event: cut off\ndata: never dispatched\n"
).encode()

EVENTS = [
    ServerSentEvent("queued", "{}"),
    ServerSentEvent("progress", "erste\n zweite Zeile: grün ☂"),
    ServerSentEvent("message", "\nafter an empty line"),
    ServerSentEvent("message", "no name"),
]


def decode(*chunks: bytes) -> list[ServerSentEvent]:
    decoder = EventDecoder()
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def test_the_fields_of_an_event_are_read_as_the_standard_says() -> None:
    assert decode(STREAM) == EVENTS


def test_single_bytes_give_the_same_events() -> None:
    assert decode(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cut_gives_the_same_events(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(STREAM)]
    assert decode(*(STREAM[a:b] for a, b in itertools.pairwise(places))) == EVENTS


@pytest.mark.parametrize("chunks", [(b"data: a\r", b"\ndata: b\n\n"), (b"data: a\r", b"", b"\ndata: b\n\n")])
def test_a_line_end_across_two_chunks_is_one_line_end(chunks: tuple[bytes, ...]) -> None:
    assert decode(*chunks) == [ServerSentEvent("message", "a\nb")]


def test_an_event_is_there_as_soon_as_its_blank_line_is() -> None:
    decoder = EventDecoder()
    assert list(decoder.feed(b"data: a\n")) == []
    assert list(decoder.feed(b"\nda")) == [ServerSentEvent("message", "a")]
