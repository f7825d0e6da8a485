"""Digests are of the weights and nothing else, and a single bit that is not as on the other ranks is found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from safelight.client.checksum import checksum
from safelight.tests.effort import chosen
from safelight.tests.live import LiveServer
from safelight.tests.tiny import save
from safelight.worker.weights.snapshot.digests import raw_bytes

from .conftest import Serve
from .test_updates import digests
from .trainer import Tensors, Trainer, changed, transformer

FILES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}


@pytest.fixture(scope="module")
def quarters(serve: Serve) -> Iterator[Trainer]:
    """One replica of four ranks, projections fused."""
    with serve("--fuse-projections", tp=4) as trainer:
        yield trainer


@pytest.fixture(params=chosen("divided", nightly=["alone", "quarters"]))
def any_degree(request: pytest.FixtureRequest) -> Trainer:
    found: Trainer = request.getfixturevalue(request.param)
    return found


def check(trainer: Trainer, tensors: Tensors, module: str = "transformer") -> None:
    expected = {"target_module": module, "expected_named_tensors_sha256": digests(tensors)}
    trainer.done("/update_weights_from_tensor_checker", expected)


def checked(trainer: Trainer) -> None:
    """Checksum, checker and details say of every module what its files say."""
    files = checksum(trainer.directory, detail=True)
    assert trainer.checksum() == {name: module.sha256 for name, module in files.items()}
    for module, file in FILES.items():
        check(trainer, load_file(trainer.directory / file), module)
    modules = trainer.done("/get_weights_checksum", {"detail": True})["modules"]
    for name, module in files.items():
        reported = {name: tensor["sha256"] for name, tensor in modules[name]["tensors"].items()}
        assert reported == {name: tensor.sha256 for name, tensor in module.tensors.items()}


def test_no_degree_fusing_or_sleep_changes_a_digest(any_degree: Trainer) -> None:
    checked(any_degree)
    any_degree.done("/release_memory_occupation", {})
    checked(any_degree)
    any_degree.done("/resume_memory_occupation", {})
    checked(any_degree)


def test_every_degree_has_the_digests_of_what_was_sent(any_degree: Trainer) -> None:
    new = changed(transformer(any_degree.directory), 0.3)
    any_degree.update(new)
    check(any_degree, new)
    any_degree.restore()
    checked(any_degree)


def test_a_tensor_that_an_update_leaves_out_after_a_reset_does_not_compare_equal(any_degree: Trainer) -> None:
    """The requests of miles' ``--check-weight-update-equal``: snapshot, reset, an update, compare."""
    own, before = transformer(any_degree.directory), any_degree.checksum()
    lost = "proj_out.bias"
    any_degree.done("/weights_checker", {"action": "snapshot", "allow_quant_error": False, "selector": "all"})
    reset = {"action": "reset_tensors", "allow_quant_error": False, "selector": "all"}
    reported = any_degree.done("/weights_checker", reset | {"skip_tensor_list": ["norm_out."]})
    assert reported["applied"] == reported["expected"] - sum("norm_out." in name for name in own) < len(own)
    noise = any_degree.done("/get_weights_checksum", {"detail": True})["modules"]
    unchanged = {
        name for name, digest in digests(own).items() if noise["transformer"]["tensors"][name]["sha256"] == digest
    }
    assert unchanged == {name for name in own if "norm_out." in name}
    assert {name: module["sha256"] == before[name] for name, module in noise.items()} == {
        name: name != "transformer" for name in before
    }
    any_degree.update({name: tensor for name, tensor in own.items() if name != lost})
    differs = any_degree.post("/weights_checker", {"action": "compare"})
    assert (differs.status_code, differs.json()["mismatched"]) == (400, [lost])
    any_degree.done("/weights_checker", {"action": "compare", "skip_tensor_list": [lost]})
    any_degree.update({lost: own[lost]})
    any_degree.done("/weights_checker", {"action": "compare"})
    assert any_degree.checksum() == before


def test_buffers_and_tensors_without_dimensions_are_digested_and_updated(tmp_path: Path) -> None:
    checkpoint = save("flux2", tmp_path)  # the normalisation of its autoencoder keeps both
    with LiveServer(checkpoint, ["--threads", "1"]) as server:
        server.wait_ready()
        trainer = Trainer(server, checkpoint)
        assert trainer.checksum() == {name: module.sha256 for name, module in checksum(checkpoint).items()}
        own = load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
        kept = {name: own[name] for name in ("bn.num_batches_tracked", "bn.running_mean", "bn.running_var")}
        assert kept["bn.num_batches_tracked"].ndim == 0
        check(trainer, kept, "vae")
        new = {name: tensor + 1 for name, tensor in kept.items()}
        trainer.update(new, target_module="vae")
        check(trainer, new, "vae")
        check(trainer, {name: tensor for name, tensor in own.items() if name not in kept}, "vae")


def _addresses(process: psutil.Process, wanted: bytes) -> list[int]:
    """Where the process has such bytes in memory that it may write."""
    found = []
    with open(f"/proc/{process.pid}/maps") as maps, open(f"/proc/{process.pid}/mem", "rb") as memory:
        for line in maps:
            span, rights, *_ = line.split()
            if not rights.startswith("rw") or "[v" in line:
                continue
            start, end = (int(number, 16) for number in span.split("-"))
            memory.seek(start)
            data, at = memory.read(end - start), -1
            while (at := data.find(wanted, at + 1)) >= 0:
                found.append(start + at)
    return found


@contextmanager
def flipped(process: psutil.Process, tensor: torch.Tensor) -> Iterator[None]:
    """One bit, the lowest, of the last number of ``tensor`` is another one in the process' memory."""
    end = bytes(raw_bytes(tensor))[-64:]
    other = bytes([*end[:-4], end[-4] ^ 1, *end[-3:]])
    places = _addresses(process, end)
    assert places, "the rank has the end of the tensor"

    def replace(old: bytes, new: bytes) -> None:
        """Addresses that still hold ``old``; freed memory may hold something else by now."""
        with open(f"/proc/{process.pid}/mem", "rb+", buffering=0) as memory:
            for place in places:
                with contextlib.suppress(OSError):  # it is no longer mapped
                    memory.seek(place)
                    if memory.read(len(old)) == old:
                        memory.seek(place)
                        memory.write(new)

    replace(end, other)
    try:
        yield
    finally:
        replace(other, end)


CASES: dict[str, tuple[str, str, Callable[[Tensors], str]]] = {
    "a part": ("transformer", "Replica 1", lambda tensors: "transformer_blocks.0.attn.to_q.weight"),
    "a copy": ("transformer", "Rank 1 of replica 1", lambda tensors: "proj_out.weight"),
    "a module that every rank has": ("vae", "Rank 1 of replica 1", lambda tensors: "decoder.conv_in.weight"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_bit_on_one_rank_of_one_replica_is_found(case: str, divided: Trainer) -> None:
    module, named, choose = CASES[case]
    own = load_file(divided.directory / FILES[module])
    name = choose(own)
    with flipped(divided.rank_processes(1)[1], own[name]):
        answer = divided.post("/get_weights_checksum", {})
        assert (answer.status_code, answer.json()["success"]) == (500, False)
        assert answer.json()["message"].startswith(named), answer.text
        assert module in answer.json()["message"]
        expected = {"target_module": module, "expected_named_tensors_sha256": digests(own)}
        refused = divided.post("/update_weights_from_tensor_checker", expected)
        assert (refused.status_code, refused.json()["mismatched"]) == (400, [name])
    checked(divided)
