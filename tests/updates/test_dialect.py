"""The JSON dialect of trainers against a running server: pickled handles of memory that another process shares."""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safelight.client.checksum import checksum
from safelight.tests.worker.weights import trainer as sending
from safelight.tests.worker.weights.streams import START, called, named, several, text

from .conftest import Serve
from .trainer import Trainer, changed, transformer

ROUTE = "/update_weights_from_tensor"


@pytest.fixture(scope="module")
def sender() -> Iterator[sending.Trainer]:
    """A process that holds weights of its own, and shares them by file."""
    with sending.Trainer() as started:
        yield started


@pytest.fixture(autouse=True)
def _restored(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "trainer" in request.fixturenames:
        request.getfixturevalue("trainer").restore()


def weights(trainer: Trainer) -> Path:
    return trainer.directory / "transformer" / "diffusion_pytorch_model.safetensors"


def digest_of(trainer: Trainer, by: float) -> str:
    """The transformer's checksum with ``by`` added to every tensor, as another encoding gives it."""
    trainer.update(changed(transformer(trainer.directory), by))
    wanted = trainer.checksum()["transformer"]
    trainer.restore()
    return wanted


def checksum_of_files(directory: Path) -> dict[str, str]:
    return {module: digests.sha256 for module, digests in checksum(directory).items()}


def refused(trainer: Trainer, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON of the 400 that ``body`` gets; no byte has changed."""
    before = trainer.checksum()
    answer = trainer.post(ROUTE, body)
    assert answer.status_code == 400, answer.text
    assert trainer.checksum() == before
    reported: dict[str, Any] = answer.json()
    assert reported["success"] is False
    return reported


@pytest.mark.parametrize("form", sending.FORMS)
def test_every_form_writes_what_it_holds_and_the_senders_memory_is_free(
    form: str, sender: sending.Trainer, trainer: Trainer
) -> None:
    wanted = digest_of(trainer, 0.25)
    before = sender.segments()
    payload = sender.checkpoint(weights(trainer), form, by=0.25)
    assert sender.segments() > before
    load_format = None if form in ("pairs", "modules") else "flattened_bucket"
    reported = trainer.done(
        ROUTE, {"serialized_named_tensors": [payload], "load_format": load_format, "weight_version": form}
    )
    assert sender.segments() == before, "nothing of it is left when the reply has come"
    assert (reported["applied"], reported["weight_version"]) == (len(transformer(trainer.directory)), form)
    assert trainer.checksum()["transformer"] == wanted


def test_each_rank_takes_its_own_payload_of_as_many(sender: sending.Trainer, divided: Trainer) -> None:
    wanted = digest_of(divided, 0.5)
    before = sender.segments()
    payloads = [sender.checkpoint(weights(divided), "pairs", by=0.5) for _ in range(2)]
    divided.done(ROUTE, {"serialized_named_tensors": payloads})
    assert divided.checksum()["transformer"] == wanted
    assert sender.segments() == before
    divided.restore()


@pytest.mark.parametrize("torn", ["values", "names", "empty", "dtypes"])
@pytest.mark.parametrize("odd_rank", [0, 1])
def test_ranks_that_are_sent_different_tensors_write_none_of_them(
    odd_rank: int, torn: str, sender: sending.Trainer, divided: Trainer, tmp_path: Path
) -> None:
    before, file = sender.segments(), tmp_path / "other.safetensors"
    tensors = transformer(divided.directory)
    if torn == "dtypes":
        tensors = {name: tensor.double() for name, tensor in tensors.items()}
    last = max(tensors)
    if torn == "names":
        del tensors[last]
    save_file(tensors, file)
    by = 0.25 if torn == "values" else 0.5
    odd = sender.send("no tensors") if torn == "empty" else sender.checkpoint(file, "pairs", by=by)
    payloads = [sender.checkpoint(weights(divided), "pairs", by=0.5), odd]
    if odd_rank == 0:
        payloads.reverse()
    update_id = divided.done("/begin_weights_update", {})["update_id"]
    answer = divided.post(ROUTE, {"serialized_named_tensors": payloads, "update_id": update_id})
    assert answer.status_code == 400, answer.text
    commit = divided.post("/commit_weights_update", {"update_id": update_id, "require_complete": True})
    assert commit.status_code == 400, "there is nothing complete"
    divided.done("/abort_weights_update", {"update_id": update_id})
    whole = 1 - odd_rank
    reason = {
        "values": "rank 1 was given other values than rank 0",
        "names": f"only rank {whole} was given it, not rank {odd_rank}",
        "empty": f"only rank {whole} was given it, not rank {odd_rank}",
    }.get(torn)
    reported = answer.json()["invalid"]
    assert reason is None or reported[0]["reason"] == reason
    if torn == "names":
        assert reported == [{"name": last, "reason": reason}]
    assert divided.checksum() == checksum_of_files(divided.directory)
    assert sender.segments() == before, "the sender has its memory back"


def test_an_adapter_that_is_sent_to_each_rank_is_the_same_for_all(
    sender: sending.Trainer, divided: Trainer, tmp_path: Path
) -> None:
    layer = next(name for name in transformer(divided.directory) if name.endswith("to_q.weight"))
    rows, columns = transformer(divided.directory)[layer].shape
    payloads = []
    for number in range(2):
        factors = {
            layer.replace(".weight", ".lora_A.weight"): torch.full((2, columns), 0.1 + number),
            layer.replace(".weight", ".lora_B.weight"): torch.full((rows, 2), 0.1),
        }
        save_file(factors, file := tmp_path / f"{number}.safetensors")
        payloads.append(sender.checkpoint(file, "pairs", by=0.0))
    reported = refused(divided, {"serialized_named_tensors": payloads, "weight_update_mode": "lora_merge"})
    assert reported["invalid"][0]["reason"] == "rank 1 was given other values than rank 0"


def test_another_number_of_payloads_than_of_ranks(sender: sending.Trainer, trainer: Trainer) -> None:
    payloads = [sender.checkpoint(weights(trainer), "pairs", by=0.5, keep=True) for _ in range(3)]
    reported = refused(trainer, {"serialized_named_tensors": payloads})
    assert f"there are 3 payloads for {trainer.ranks} ranks" in reported["message"]
    sender.forget()


def test_gpus_that_no_rank_has(sender: sending.Trainer, trainer: Trainer) -> None:
    payload = sender.send("one", keep=True)
    reported = refused(trainer, {"serialized_named_tensors": [payload], "payload_gpu_uuids": [f"GPU-{sending.UUID}"]})
    assert f"the payloads come from the GPUs GPU-{sending.UUID}, and rank 0 has None" in reported["message"]
    sender.forget()


def test_an_empty_bucket_changes_nothing_and_is_accepted(sender: sending.Trainer, trainer: Trainer) -> None:
    before, version = trainer.checksum(), trainer.draw()["weight_version"]
    payload = sender.send("no tensors")
    reported = trainer.done(ROUTE, {"serialized_named_tensors": [payload], "load_format": "flattened_bucket"})
    assert (reported["applied"], reported["weight_version"]) == (0, version)
    assert trainer.checksum() == before


def test_buckets_of_a_begun_update(sender: sending.Trainer, trainer: Trainer) -> None:
    wanted = digest_of(trainer, 0.75)
    update_id = trainer.done("/begin_weights_update", {})["update_id"]
    for form in ("elements", "plain bytes"):
        payload = sender.checkpoint(weights(trainer), form, by=0.75)
        trainer.done(ROUTE, {"serialized_named_tensors": [payload], "update_id": update_id})
    trainer.done("/commit_weights_update", {"update_id": update_id, "require_complete": True})
    assert trainer.checksum()["transformer"] == wanted


def test_names_that_the_model_does_not_have_and_the_senders_memory_is_free(
    sender: sending.Trainer, trainer: Trainer
) -> None:
    before = sender.segments()
    reported = refused(trainer, {"serialized_named_tensors": [sender.send("pairs")]})
    assert "plain" in reported["unknown"]
    trainer.checksum()  # behind the update that was refused
    assert sender.segments() == before


def test_one_tensor_twice_is_named(sender: sending.Trainer, trainer: Trainer) -> None:
    reported = refused(trainer, {"serialized_named_tensors": [sender.send("twice", keep=True)]})
    assert reported["invalid"] == [{"name": "a", "reason": "occurs twice"}]
    sender.forget()


def test_modules_other_than_those_that_are_named(sender: sending.Trainer, trainer: Trainer) -> None:
    body = {"serialized_named_tensors": [sender.send("modules", keep=True)], "target_modules": ["transformer"]}
    assert "the payload is for transformer, vae" in refused(trainer, body)["message"]
    sender.forget()


def test_shared_file_descriptors_are_refused_with_what_to_do(sender: sending.Trainer, trainer: Trainer) -> None:
    payload = sender.send("one", strategy="file_descriptor")
    reported = refused(trainer, {"serialized_named_tensors": [payload]})
    assert 'torch.multiprocessing.set_sharing_strategy("file_system")' in reported["message"]


def test_segments_that_are_gone(sender: sending.Trainer, trainer: Trainer) -> None:
    payload = sender.checkpoint(weights(trainer), "bytes", by=0.5)
    trainer.done(ROUTE, {"serialized_named_tensors": [payload]})
    trainer.restore()
    assert "cannot be opened" in refused(trainer, {"serialized_named_tensors": [payload]})["message"]


@pytest.mark.parametrize("text", ["?", "gASVx", "é", ""])
def test_invalid_payloads(text: str, trainer: Trainer) -> None:
    refused(trainer, {"serialized_named_tensors": [text]})


def test_no_payload_at_all(trainer: Trainer) -> None:
    refused(trainer, {"serialized_named_tensors": []})


def handles(ranks: int) -> dict[str, Any]:
    """A body with one CUDA handle for each of so many ranks."""
    view = {"name": "a", "dtype": "float32", "shape": [3], "stride": [1], "offset": 0, "device": sending.UUID}
    memory = {"memory": base64.b64encode(b"\2c" + bytes(64)).decode(), "storage_bytes": 12, "storage_offset": 0}
    counted = {"counters": base64.b64encode(b"/torch_1_2_3").decode(), "counter": 0}
    event = {"event": base64.b64encode(bytes(64)).decode(), "event_sync": True}
    return {"shared": {"cuda_ipc": [[view | memory | counted | event]] * ranks}}


def test_cuda_handles_where_there_is_no_gpu(trainer: Trainer) -> None:
    assert (
        "the handle of a needs a GPU" in refused(trainer, handles(len(trainer.replicas()) * trainer.ranks))["message"]
    )


def test_cuda_handles_for_another_number_of_ranks(trainer: Trainer) -> None:
    reported = refused(trainer, handles(3))
    assert (
        f"There are 3 lists of handles; {len(trainer.replicas()) * trainer.ranks} ranks need one each"
        in reported["message"]
    )


def test_cuda_handles_that_are_none(trainer: Trainer) -> None:
    assert trainer.post(ROUTE, {"shared": {"cuda_ipc": [[{"name": "a"}]]}}).status_code == 422
    refused(trainer, {"shared": {}})


def test_a_stream_that_would_run_something_runs_nothing(tmp_path: Path, trainer: Trainer) -> None:
    made = tmp_path / "made"

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {made}",)

    hidden = called(named("functools", "partial"), named("os", "system"), text(f"touch {made}"))
    for stream in (pickle.dumps([("w", Runs())]), START + b"](" + several(text("w"), called(hidden)) + b"e."):
        payload = base64.b64encode(stream).decode()
        reported = refused(trainer, {"serialized_named_tensors": [payload]})
        assert "which no payload needs" in reported["message"]
    assert not made.exists()


def test_the_dialect_can_be_switched_off(serve: Serve, sender: sending.Trainer) -> None:
    with serve("--no-pickle-payloads") as trainer:
        payload = sender.checkpoint(weights(trainer), "pairs", by=0.5, keep=True)
        assert "--no-pickle-payloads" in refused(trainer, {"serialized_named_tensors": [payload]})["message"]
        sender.forget()
        trainer.update(changed(transformer(trainer.directory)))
