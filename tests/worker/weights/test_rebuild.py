"""The allowed descriptions of a tensor and its memory in a stream, and the release of that memory."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch

from .streams import (
    FLOAT,
    MANAGER,
    SEGMENT,
    SIZE,
    START,
    TENSOR,
    UNTYPED,
    called,
    data,
    named,
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


def read(one: bytes) -> torch.Tensor:
    ((_, found),) = unpickle(pairs(one))
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize(
    ("size", "stride", "offset", "expected"),
    [
        ((6,), (1,), 0, [0, 1, 2, 3, 4, 5]),
        ((2, 2), (3, 1), 1, [[1, 2], [4, 5]]),
        ((), (), 5, 5),
        ((1,), (1 << 48,), 5, [5]),
        ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),
        ((2, 2), (1, 1), 3, [[3, 4], [4, 5]]),
        ((0, 3), (7, 9), 1 << 40, []),
    ],
)
def test_a_view_within_the_segment_is_made(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int, expected: object, segments: Path
) -> None:
    found = read(tensor(numbers(*size), numbers(*stride), number(offset)))
    assert (found.shape, found.tolist()) == (size, expected)


NUMBER = "has an argument that is not an integer from 0 to 281474976710656"
VIEW = "has an invalid size or stride"
OTHER = "does not have the arguments that torch writes"


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (tensor(numbers(7), numbers(1)), "reaches element 6 of a storage of 6"),
        (tensor(numbers(2, 3), numbers(4, 1)), "reaches element 6 of a storage of 6"),
        (tensor(numbers(6), numbers(1), number(1)), "reaches element 6 of a storage of 6"),
        (tensor(numbers(), numbers(), number(6)), "reaches element 6 of a storage of 6"),
        (tensor(numbers(2), numbers(1 << 48)), "reaches element 281474976710656 of a storage of 6"),
        (tensor(dtype=named("torch", "float64")), "reaches element 5 of a storage of 3"),
        (tensor(numbers(7), numbers(0)), "makes 7 elements of the 6 in its storage; send it contiguous"),
        (tensor(numbers(1 << 48), numbers(0)), "makes 281474976710656 elements of the 6"),
        (tensor(numbers(3, 3), numbers(1, 1)), "makes 9 elements of the 6"),
        (tensor(numbers(-1), numbers(1)), VIEW),
        (tensor(numbers(1 << 49), numbers(0)), VIEW),
        (tensor(numbers(1 << 25, 1 << 25), numbers(0, 0)), VIEW),
        (tensor(numbers(0, 1 << 40, 1 << 40), numbers(0, 0, 0)), VIEW),
        (tensor(numbers(2, 3), numbers(3)), VIEW),
        (tensor(numbers(*[1] * 65), numbers(*[1] * 65)), VIEW),
        (tensor(numbers(*[1 << 47] * 1000), numbers(*[1] * 1000)), VIEW),
        (tensor(several(number(2), b"N")), VIEW),
        (tensor(several(number(6), b"\x88")), VIEW),
        (tensor(several(number(2), text("3"))), VIEW),
        (tensor(several(number(2), several())), VIEW),
        (tensor(b"N"), OTHER),
        (tensor(b"]"), OTHER),
        (tensor(stride=numbers(-3, 1)), NUMBER),
        (tensor(stride=numbers(1 << 49, 1)), NUMBER),
        (tensor(stride=several(number(3), b"\x88")), NUMBER),
        (tensor(stride=b"]"), OTHER),
        (tensor(offset=number(-1)), NUMBER),
        (tensor(offset=b"\x89"), NUMBER),
        (tensor(offset=text("0")), NUMBER),
        (tensor(offset=numbers(0)), NUMBER),
        (tensor(grad=number(0)), OTHER),
        (tensor(grad=b"N"), OTHER),
        (tensor(dtype=TENSOR), OTHER),
        (tensor(dtype=text("float32")), OTHER),
        (tensor(cls=SIZE), OTHER),
        (tensor(cls=FLOAT), OTHER),
        (tensor(cls=UNTYPED), OTHER),
        (tensor(shared=b"N"), OTHER),
        (tensor(shared=UNTYPED), OTHER),
        (tensor(shared=tensor()), OTHER),
        (tensor(shared=called(SIZE, numbers(1))), OTHER),
        (tensor(shared=called(reduction("rebuild_storage_empty"))), OTHER),
        (tensor(shared=called(reduction("rebuild_storage_empty"), UNTYPED, UNTYPED)), OTHER),
        (tensor(shared=called(reduction("rebuild_storage_empty"), UNTYPED)), "reaches element 5 of a storage of 0"),
        (tensor(shared=storage(nbytes=number(28))), "has 24 bytes of data, not 28"),
        (tensor(shared=storage(nbytes=number(20))), "has 24 bytes of data, not 20"),
        (tensor(shared=storage(nbytes=number(-1))), NUMBER),
        (tensor(shared=storage(nbytes=b"\x88")), NUMBER),
        (tensor(shared=storage(nbytes=text("24"))), NUMBER),
        (storage(), "rebuild_storage_filename, called at byte 188, does not give a value that a payload can hold"),
        (called(SIZE, number(1)), "torch.Size, called at byte 43, does not give a value"),
    ],
)
def test_a_view_beyond_the_segment_or_of_other_arguments_is_refused(one: bytes, reason: str, segments: Path) -> None:
    assert reason in refused(pairs(one), segments)


@pytest.mark.parametrize(
    "handle",
    [
        b"",
        b"/",
        b"torch_1_2_3",
        b"/torch_1_2",
        b"/torch_1_2_3_4",
        b"/torch_1_2_3\n",
        b"/torch_1_2_3\0",
        b"/torch_1_2_3\0/../../etc/passwd",
        b"//torch_1_2_3",
        b"/../shm/torch_1_2_3",
        b"/etc/passwd",
        b"/torch_-1_2_3",
        b"/torch_1_2_x",
        b"/torch_1_2_" + b"3" * 21,
        "/torch_1_2_٣".encode(),
    ],
)
def test_only_torchs_own_names_of_segments_are_opened(handle: bytes, segments: Path) -> None:
    reason = refused(pairs(tensor(shared=storage(handle=handle))), segments)
    assert reason.endswith("fails: a segment's name is not one of torch's")


@pytest.mark.parametrize(
    "manager",
    [
        b"",
        b"manager.sock",
        b"/var/run/docker.sock",
        b"/tmp/torch-shm-dir-aB3dE6",
        b"/tmp/torch-shm-dir-aB3dE6/manager.sock/",
        b"/tmp/torch-shm-dir-aB3dE6/manager.sock\0",
        b"/tmp/torch-shm-dir-aB3dE67/manager.sock",
        b"/tmp/torch-shm-dir-aB3/E6/manager.sock",
        b"tmp/torch-shm-dir-aB3dE6/manager.sock",
    ],
)
def test_only_torchs_own_names_of_managers_are_accepted(manager: bytes, segments: Path) -> None:
    assert OTHER in refused(pairs(tensor(shared=storage(manager=manager))), segments)


@pytest.mark.parametrize("manager", [MANAGER, b"/torch-shm-dir-aB3dE6/manager.sock", b"/a b/c" + MANAGER])
def test_a_manager_may_be_in_any_folder_and_is_not_looked_at(manager: bytes, segments: Path) -> None:
    assert read(tensor(shared=storage(manager=manager))).shape == (2, 3)


def test_a_segment_that_is_not_a_file_of_this_user_is_refused(segments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (
        lambda path: path.symlink_to(segments / "torch_1_2_3"),
        lambda path: path.mkdir(),
        os.mkfifo,
    ):
        path = segments / "torch_4_5_6"
        make(path)
        reason = refused(pairs(tensor(shared=storage(handle=b"/torch_4_5_6"))), segments)
        assert "the segment /torch_4_5_6 cannot be opened" in reason or "is not a regular file of this user" in reason
        path.rmdir() if path.is_dir() else path.unlink()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "the segment /torch_1_2_3 is not a regular file of this user" in refused(pairs(tensor()), segments)
    assert owners(segments) == 2


@pytest.mark.parametrize("count", [0, -1, -(1 << 31)])
def test_a_segment_without_owners_is_refused_and_left_as_it_is(count: int, segments: Path) -> None:
    path = segments / SEGMENT.decode()[1:]
    path.write_bytes(struct.pack("<i", count) + path.read_bytes()[4:])
    assert "the segment /torch_1_2_3 has no owner" in refused(pairs(tensor()), segments)
    assert owners(segments) == count


def test_a_reader_takes_itself_from_the_owners_and_the_last_removes_the_name(segments: Path) -> None:
    first = read(tensor())
    assert owners(segments) == 1
    second = read(tensor())
    assert list(segments.iterdir()) == []
    second.zero_()
    assert first.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_a_reader_that_does_not_release_changes_nothing(segments: Path) -> None:
    before = (segments / SEGMENT.decode()[1:]).read_bytes()
    unpickle(pairs(tensor()), release=False)
    assert (segments / SEGMENT.decode()[1:]).read_bytes() == before


def test_a_storage_that_two_tensors_name_is_opened_once(segments: Path) -> None:
    stream = START + b"](" + several(text("v"), tensor(shared=storage() + b"\x94"))
    stream += several(text("w"), tensor(numbers(1), numbers(1), number(1), shared=b"h\0")) + b"e."
    (_, one), (_, other) = unpickle(stream)
    assert owners(segments) == 1
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@pytest.mark.parametrize("cls", [TENSOR, named("torch.nn.parameter", "Parameter")])
@pytest.mark.parametrize("grad", [b"\x88", b"\x89"])
def test_parameters_become_tensors_without_gradient(cls: bytes, grad: bytes, segments: Path) -> None:
    with torch.enable_grad():
        found = read(tensor(cls=cls, grad=grad))
    assert type(found) is torch.Tensor
    assert not found.requires_grad


def test_an_empty_segment_is_an_empty_tensor(segments: Path) -> None:
    (segments / "torch_4_5_6").write_bytes(struct.pack("<i60x", 1))
    empty = storage(handle=b"/torch_4_5_6", nbytes=number(0))
    assert read(tensor(numbers(0, 3), numbers(3, 1), shared=empty)).shape == (0, 3)
    assert [path.name for path in segments.iterdir()] == ["torch_1_2_3"]


def test_bytes_and_dictionaries_of_older_protocols_are_read(segments: Path) -> None:
    encode = named("_codecs", "encode")
    old = [called(encode, text(part.decode()), text("latin1")) for part in (MANAGER, SEGMENT)]
    shared = called(reduction("rebuild_storage_filename"), UNTYPED, *old, number(24))
    ordered = (
        named("collections", "OrderedDict")
        + b")R"
        + text("vae")
        + b"]("
        + several(text("w"), tensor(shared=shared))
        + b"es"
    )
    found = unpickle(START + ordered + b".")
    assert list(found) == ["vae"]
    assert found["vae"][0][1].shape == (2, 3)


def test_bytes_are_not_accepted_as_text(segments: Path) -> None:
    shared = called(reduction("rebuild_storage_filename"), UNTYPED, data(MANAGER), text(SEGMENT.decode()), number(24))
    assert OTHER in refused(pairs(tensor(shared=shared)), segments)


@pytest.mark.parametrize(("size", "stride"), [((2, 1), (1, 7)), ((1,), (5,)), ((1, 3, 1), (0, 1, 9)), ((1, 1), (4, 0))])
def test_strides_that_no_element_needs_are_those_of_a_plain_tensor(
    size: tuple[int, ...], stride: tuple[int, ...], segments: Path
) -> None:
    """Others are legal, and torch then cannot view the bytes."""
    found = read(tensor(numbers(*size), numbers(*stride)))
    assert found.shape == size
    assert found.is_contiguous()
    assert found.reshape(-1).view(torch.uint8).numel() == 4 * found.numel()
