"""Real streams of a real trainer's process: what they mean, whose memory they are, and what is wrong with others."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.protocol.codec import Buffer
from safelight.protocol.tensor_sources import Pickled
from safelight.worker.weights.checkpoint.names import Tensors
from safelight.worker.weights.transport.allowlist import NotAPayload
from safelight.worker.weights.transport.groups import ProcessGroups
from safelight.worker.weights.transport.payload import InvalidTensor, choose, interpret
from safelight.worker.weights.transport.sources import RankContext, open_source

from .streams import decode
from .trainer import UUID, Trainer, floats, mixed, of_dtype, weights

ONE = ["transformer"]
CPU = torch.device("cpu")
READER = """
import base64, sys
from safelight.worker.weights.transport.payload import decode
from safelight.worker.weights.transport.shm_segment import Segments
segments = Segments()
held = decode(base64.b64decode(sys.stdin.readline()), ["transformer"], segments)
segments.release()
print("held", flush=True)
sys.stdin.readline()
del held
print("let go", flush=True)
"""


def assert_same(found: dict[str, torch.Tensor], expected: list[tuple[str, torch.Tensor]]) -> None:
    """Bitwise, with dtypes and shapes."""
    assert list(found) == [name for name, _ in expected]
    for name, tensor in expected:
        assert type(found[name]) is torch.Tensor
        assert not found[name].requires_grad
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert _bytes(found[name]) == _bytes(tensor), name


def _bytes(tensor: torch.Tensor) -> list[int]:
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).tolist() if flat.numel() else []


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("pairs", {"transformer": weights}),
        ("modules", {"transformer": weights, "vae": floats}),
        ("ordered", {"transformer": weights}),
        ("elements", {"transformer": floats}),
        ("bytes", {"transformer": mixed}),
        ("plain elements", {"transformer": floats}),
        ("plain bytes", {"transformer": mixed}),
        ("object", {"transformer": mixed}),
        ("no tensors", {"transformer": list}),
        ("no pairs", {"transformer": list}),
    ],
)
def test_every_form_of_every_protocol_is_read(
    what: str, expected: dict[str, Callable[[], Any]], protocol: int, trainer: Trainer
) -> None:
    found = decode(trainer.send(what, protocol=protocol), list(expected))
    assert list(found) == list(expected)
    for module, tensors in expected.items():
        assert_same(found[module], tensors())


def test_every_dtype_arrives_bitwise(trainer: Trainer) -> None:
    found = decode(trainer.send("dtypes"), ONE)["transformer"]
    assert len(found) == 20
    for name, tensor in found.items():
        assert str(tensor.dtype) == name
        assert _bytes(tensor) == _bytes(of_dtype(tensor.dtype))


@pytest.mark.parametrize("what", ["no tensors", "no pairs"])
def test_nothing_to_share_needs_no_sharing_strategy(what: str, trainer: Trainer) -> None:
    assert decode(trainer.send(what, strategy="file_descriptor"), ONE) == {"transformer": {}}


def test_tensors_of_one_storage_stay_views_of_it(trainer: Trainer) -> None:
    found = decode(trainer.send("pairs"), ONE)["transformer"]
    found["one"].zero_()
    assert found["other"].t().flatten().tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 8, 9, 10, 11]


@pytest.mark.parametrize(("what", "copied"), [("elements", set()), ("bytes", {"b", "plain", "parameter", "frozen"})])
def test_only_what_is_not_aligned_is_copied_out_of_a_bucket(what: str, copied: set[str], trainer: Trainer) -> None:
    found = decode(trainer.send(what), ONE)["transformer"]
    there = found["a"].untyped_storage().data_ptr()
    assert {name for name, one in found.items() if one.untyped_storage().data_ptr() != there} == copied


def test_letting_go_frees_the_senders_memory_and_not_before(trainer: Trainer) -> None:
    before = trainer.segments()
    payload = trainer.send("pairs")
    assert len(trainer.segments() - before) == 7  # of nine tensors, three share one
    held = decode(payload, ONE)
    assert trainer.segments() == before
    assert _mapped(trainer) == 6  # one is empty
    last = held["transformer"]["scalar"]
    del held
    assert _mapped(trainer) == 1
    assert last == 2.5
    del last
    assert _mapped(trainer) == 0


def _mapped(trainer: Trainer) -> int:
    """How many segments of the trainer this process holds, whether they still have names or not."""
    return Path("/proc/self/maps").read_text().count(f"/dev/shm/torch_{trainer.pid}_")


def test_what_the_sender_keeps_stays_its_own(trainer: Trainer) -> None:
    before = trainer.segments()
    for _ in range(3):
        decode(trainer.send("one", keep=True), ONE)
    assert len(trainer.segments() - before) == 3
    trainer.forget()
    assert trainer.segments() == before


def test_a_payload_that_is_refused_for_its_meaning_is_released_too(trainer: Trainer) -> None:
    before = trainer.segments()
    for what in ("twice", "one", "expanded"):
        with pytest.raises(NotAPayload):
            decode(trainer.send(what), ["transformer", "vae"] if what == "one" else ONE)
    assert trainer.segments() == before


def test_several_ranks_read_one_stream_and_the_last_releases_it(trainer: Trainer) -> None:
    before = trainer.segments()
    payload = trainer.send("one")
    first = decode(payload, ONE, release=False)
    decode(payload, ONE, release=False)
    assert len(trainer.segments() - before) == 1
    decode(payload, ONE)
    assert trainer.segments() == before
    assert first["transformer"]["a"].tolist() == [1, 1, 1]
    del first
    assert _mapped(trainer) == 0
    with pytest.raises(NotAPayload, match=r"the segment /torch_\d+_\d+_\d+ cannot be opened: No such file"):
        decode(payload, ONE)


@pytest.mark.parametrize("copies", [1, 2])
def test_what_the_sender_keeps_stays_its_own_however_often_it_lists_one_stream(trainer: Trainer, copies: int) -> None:
    before = trainer.segments()
    for _ in range(2):
        stream = base64.b64decode(trainer.send("one", keep=True))
        source = Pickled([Buffer(bytes(bytearray(stream))) for _ in range(copies)], ONE)
        ranks = [RankContext(rank, 2, rank, 2, CPU, is_primary=True) for rank in range(2)]
        for opened in [open_source(source, ProcessGroups(0, CPU), rank, lambda: None) for rank in ranks]:
            assert opened.tensors["transformer"]["a"].tolist() == [1, 1, 1]
            opened.close()
    assert len(trainer.segments() - before) == 2
    trainer.forget()
    assert trainer.segments() == before


def test_a_stream_that_is_sent_again_does_not_abort_the_sender(fresh_trainer: Trainer) -> None:
    payload = fresh_trainer.send("one", keep=True)
    decode(payload, ONE)
    decode(payload, ONE)  # takes away the sender's own reference, as in torch
    with pytest.raises(NotAPayload, match="cannot be opened"):
        decode(payload, ONE)
    fresh_trainer.forget()
    fresh_trainer.quit()


@pytest.mark.parametrize("killed", [False, True])
def test_a_reader_survives_that_the_sender_is_gone_before_it_lets_go(killed: bool, fresh_trainer: Trainer) -> None:
    command = [sys.executable, "-c", READER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        print(fresh_trainer.send("one", keep=True), file=reader.stdin, flush=True)
        assert reader.stdout.readline() == "held\n"
        if killed:
            fresh_trainer.kill_manager()
            fresh_trainer.kill()
        else:
            fresh_trainer.quit()
            while fresh_trainer.segments():  # until its manager has removed them
                time.sleep(0.02)
        print(file=reader.stdin, flush=True)
        assert reader.stdout.readline() == "let go\n"
    assert reader.returncode == 0
    for name in fresh_trainer.segments():
        (Path("/dev/shm") / name).unlink()


def test_a_reader_does_not_keep_the_memory_of_a_sender_that_is_gone(fresh_trainer: Trainer) -> None:
    decode(fresh_trainer.send("one", keep=True), ONE)
    fresh_trainer.send("one")
    assert len(fresh_trainer.segments()) == 2
    fresh_trainer.quit()
    while fresh_trainer.segments():  # until its manager has noticed
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("twice", "the tensor 'a' of transformer occurs twice"),
        ("meta", "names 'torch.multiprocessing.reductions.rebuild_meta_tensor' at byte"),
        ("sparse", "names 'torch.multiprocessing.reductions.rebuild_sparse_coo_tensor' at byte"),
        ("expanded", "makes 3 elements of the 1 in its storage; send it contiguous"),
        ("float", "the opcode BINFLOAT at byte"),
        ("state dict", "the opcode BUILD at byte .* is applied to a dict"),
    ],
)
def test_invalid_payloads_are_refused_with_the_reason(what: str, reason: str, trainer: Trainer) -> None:
    with pytest.raises(NotAPayload, match=reason):
        decode(trainer.send(what), ONE)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_shared_file_descriptor_is_refused_with_what_to_do(protocol: int, trainer: Trainer) -> None:
    with pytest.raises(NotAPayload, match=r'call torch.*set_sharing_strategy\("file_system"\) .* safetensors'):
        decode(trainer.send("one", protocol=protocol, strategy="file_descriptor"), ONE)


# --- meaning


def bucket(length: int, of: torch.dtype = torch.float32, **entry: Any) -> dict[str, Any]:
    """``length`` numbers ``of`` a dtype, as one tensor of 2×3 float32 in elements, or as ``entry`` says."""
    given = {"name": "w", "shape": (2, 3), "dtype": torch.float32, "start_idx": 0, "end_idx": 6, "numel": 6, **entry}
    return {"flattened_tensor": torch.arange(length).to(of), "metadata": [given]}


IN_BYTES = {"start_idx": 0, "end_idx": 24, "numel": 24}


@pytest.mark.parametrize("dtype", [torch.float32, "torch.float32", "float32"])
@pytest.mark.parametrize("shape", [(2, 3), [2, 3], torch.Size((2, 3))])
def test_a_dtype_is_itself_or_its_name_and_a_shape_any_sequence(dtype: Any, shape: Any) -> None:
    found = interpret(bucket(6, dtype=dtype, shape=shape), ONE)["transformer"]["w"]
    assert torch.equal(found, torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize(("start", "shares"), [(0, True), (4, True), (8, True), (1, False), (6, False)])
def test_bytes_are_viewed_wherever_they_are_aligned(start: int, shares: bool) -> None:
    given = bucket(40, torch.uint8, start_idx=start, end_idx=start + 24, numel=24)
    found = interpret(given, ONE)["transformer"]["w"]
    assert _bytes(found) == list(range(start, start + 24))
    assert (found.untyped_storage().data_ptr() == given["flattened_tensor"].untyped_storage().data_ptr()) is shares


def test_alignment_counts_from_the_storage_and_not_from_the_buffer() -> None:
    given = bucket(0, torch.uint8, **IN_BYTES) | {"flattened_tensor": torch.arange(25, dtype=torch.uint8)[1:]}
    assert _bytes(interpret(given, ONE)["transformer"]["w"]) == list(range(1, 25))


def test_a_buffer_of_another_floating_dtype_is_cast_back() -> None:
    found = interpret(bucket(6, torch.float32, dtype="bfloat16"), ONE)["transformer"]["w"]
    assert found.dtype == torch.bfloat16
    assert found.flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (bucket(40, torch.uint8), "needs 24 bytes, has numel 6, and goes from 0 to 6"),
        (bucket(40, torch.uint8, **IN_BYTES | {"numel": 6}), "needs 24 bytes, has numel 6, and goes from 0 to 24"),
        (bucket(40, **IN_BYTES), "needs 6 elements, has numel 24, and goes from 0 to 24"),
        (bucket(6, numel=5), "needs 6 elements, has numel 5, and goes from 0 to 6"),
        (bucket(7, end_idx=7), "needs 6 elements, has numel 6, and goes from 0 to 7"),
        (bucket(6, shape=(3, 3)), "needs 9 elements, has numel 6, and goes from 0 to 6"),
        (bucket(6, start_idx=1, end_idx=7), "goes to 7 in a buffer of 6 elements"),
        (bucket(6, start_idx=-6, end_idx=0), "numel that is not an integer from 0"),
        (bucket(6, start_idx=0.0), "numel that is not an integer from 0"),
        (
            bucket(1, shape=(), start_idx=False, end_idx=1, numel=1),
            "numel that is not an integer from 0",
        ),
        (bucket(6, shape=(-2, -3)), "an invalid shape"),
        (bucket(6, shape=(True, 6)), "an invalid shape"),
        (bucket(6, shape="abc"), "an invalid shape"),
        (bucket(0, shape=(0, 1 << 40, 1 << 40), end_idx=0, numel=0), "an invalid shape"),
        (bucket(1, shape=(1,) * 65, end_idx=1, numel=1), "an invalid shape"),
        (bucket(6, dtype="float33"), "an invalid dtype"),
        (bucket(6, dtype="Tensor"), "an invalid dtype"),
        (bucket(6, dtype=6), "an invalid dtype"),
        (bucket(6, dtype=torch.int64), "is torch.int64 in a buffer of torch.float32"),
        (bucket(6, torch.int64), "is torch.float32 in a buffer of torch.int64"),
    ],
)
def test_an_entry_that_contradicts_itself_or_its_buffer_is_named(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidTensor, match=reason) as raised:
        interpret({"vae": given}, ["vae"])
    assert (raised.value.module, raised.value.name) == ("vae", "w")
    assert str(raised.value) == f"the tensor 'w' of vae {raised.value.reason}"


@pytest.mark.parametrize("buffer", [None, torch.zeros(2, 3), torch.zeros(12)[::2], torch.tensor(1.0), [0.0] * 6])
def test_a_bucket_without_a_flat_buffer_is_refused_unless_it_is_empty(buffer: Any) -> None:
    with pytest.raises(NotAPayload, match="the bucket of transformer has no 1-d contiguous tensor"):
        interpret(bucket(6) | {"flattened_tensor": buffer}, ONE)
    assert interpret({"flattened_tensor": buffer, "metadata": []}, ONE) == {"transformer": {}}


@pytest.mark.parametrize(
    "entry", [None, [], {}, {"name": "w"}, bucket(6)["metadata"][0] | {"more": 1}, bucket(6, name=1)["metadata"][0]]
)
def test_an_entry_with_other_fields_is_refused(entry: Any) -> None:
    with pytest.raises(NotAPayload, match="entry 1 of the metadata of transformer lacks the fields of a tensor"):
        interpret(bucket(6) | {"metadata": [*bucket(6)["metadata"], entry]}, ONE)


def test_a_name_that_a_bucket_has_twice_is_an_error() -> None:
    with pytest.raises(InvalidTensor, match="'w' of transformer occurs twice"):
        interpret(bucket(6) | {"metadata": bucket(6)["metadata"] * 2}, ONE)


@pytest.mark.parametrize("pair", [None, ("a",), (1, torch.ones(1)), ("a", 1), ("a", torch.ones(1), 1), "ab"])
def test_a_pair_that_is_none_is_refused(pair: Any) -> None:
    with pytest.raises(NotAPayload, match="entry 1 of transformer is not a pair of a name and a tensor"):
        interpret([("w", torch.ones(1)), pair], ONE)


@pytest.mark.parametrize("part", [None, 1, "ab", {"w": torch.ones(1)}, bucket(6) | {"more": 1}, {"metadata": []}])
def test_a_module_of_another_form_is_refused(part: Any) -> None:
    with pytest.raises(NotAPayload, match="the tensors of vae are neither a list of pairs nor a flattened bucket"):
        interpret({"vae": part}, ["vae"])


@pytest.mark.parametrize(
    ("value", "modules", "reason"),
    [
        ({"vae": []}, ["transformer"], "the payload is for vae, and the request for transformer"),
        ({"vae": []}, ["transformer", "vae"], "the payload is for vae, and the request for transformer, vae"),
        ({"transformer": [], "vae": []}, ["transformer"], "the payload is for transformer, vae, and the request for"),
        ({}, ["transformer"], "the payload is for none, and the request for transformer"),
        ([], ["transformer", "vae"], "the payload names no modules, and the request 2: transformer, vae"),
        ({"flattened_tensor": None, "metadata": []}, ["a", "b"], "the payload names no modules, and the request 2"),
        ([], [], "the payload names no modules, and the request 0: none"),
    ],
)
def test_a_payload_for_other_modules_is_refused_with_both_lists(value: Any, modules: list[str], reason: str) -> None:
    with pytest.raises(NotAPayload, match=reason):
        interpret(value, modules)


def test_modules_keep_the_order_of_the_request() -> None:
    found: Tensors = interpret({"vae": [], "transformer": []}, ["transformer", "vae"])
    assert list(found) == ["transformer", "vae"]


# --- whose payload


def test_a_rank_takes_the_only_payload_or_its_own() -> None:
    assert [choose(["p"], rank, 4, None, None) for rank in range(4)] == ["p"] * 4
    assert [choose("pqr", rank, 3, None, UUID) for rank in range(3)] == ["p", "q", "r"]


@pytest.mark.parametrize(("payloads", "world_size"), [("", 1), ("pq", 1), ("pq", 3), ("pqrs", 3), ("", 3)])
def test_another_number_of_payloads_is_an_error_with_both_counts(payloads: str, world_size: int) -> None:
    with pytest.raises(NotAPayload, match=f"there are {len(payloads)} payloads for {world_size} ranks"):
        choose(payloads, 0, world_size, None, None)


@pytest.mark.parametrize("own", ["ab-12", "GPU-ab-12", "AB-12"])
def test_a_rank_takes_the_payload_of_its_own_gpu_whatever_its_rank(own: str) -> None:
    assert choose("pq", 0, 4, ["GPU-cd", "GPU-AB-12"], own) == "q"
    assert choose("pq", 1, 2, ["ab-12", "cd"], own) == "p"


@pytest.mark.parametrize("own", ["ef", None])
def test_a_gpu_without_a_payload_is_an_error_with_both_sides(own: str | None) -> None:
    with pytest.raises(NotAPayload, match=f"come from the GPUs ab, cd, and rank 1 has {own}"):
        choose("pq", 1, 2, ["ab", "cd"], own)


def test_as_many_uuids_as_payloads_are_needed() -> None:
    with pytest.raises(NotAPayload, match="there are 2 payloads and 1 GPU UUIDs"):
        choose("pq", 0, 2, ["ab"], "ab")
