"""Weights that a client writes are on the real server, whole and checked, or nothing has changed."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import save_file

from safelight.client import (
    Client,
    InvalidRequest,
    NotFound,
    TensorsDiffer,
    TensorsRejected,
    Unavailable,
    UpdateProgress,
)
from safelight.client.checksum import checksum
from safelight.client.named_tensors import read
from safelight.client.transports import Http, Server, TransportName, open_transport
from safelight.tests.live import LiveServer
from safelight.tests.tiny import save

from .tensors import SEVERAL, Tensors, digest, plus


def picture(client: Client) -> bytes:
    size = {"width": 64, "height": 64, "steps": 2, "max_sequence_length": 64}
    return client.generate("a", seed=1, output_format="pt", deterministic=True, **size).outputs[0].data


@pytest.mark.parametrize("bucket_bytes", [SEVERAL, 1 << 30])
@pytest.mark.parametrize("route", ["shared", "http"])
def test_no_route_and_no_bucket_size_loses_a_byte(
    route: TransportName, bucket_bytes: int, trained: Client, own: Tensors
) -> None:
    new = plus(own, 0.1)
    done = trained.weights.update(new, route=route, bucket_bytes=bucket_bytes, version="all")
    assert done is not None
    assert (done.updated, done.applied, done.expected) == ({"transformer": len(own)}, len(own), len(own))
    assert done.weight_version == trained.weights.version() == "all"
    assert trained.weights.checksum()["transformer"] == digest(new)


def test_every_module_of_a_loaded_pipeline_is_an_update_of_the_same_names(trained: Client, flux: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(flux)
    before = trained.weights.checksum()
    for name in before:
        module = pipeline.components[name]
        with torch.no_grad():
            next(module.parameters()).add_(1)
        done = trained.weights.update(module, target_module=name)
        assert done is not None
        assert done.applied == done.expected, name
        assert trained.weights.checksum([name])[name] != before[name], name


def test_a_module_whose_checkpoint_has_other_names_is_sent_by_those(tmp_path: Path) -> None:
    directory = save("qwenimage", tmp_path)
    encoder = DiffusionPipeline.from_pretrained(directory).text_encoder
    names = {tensor.name for tensor in read(directory / "text_encoder").tensors}
    assert names != set(encoder.state_dict())
    for module in (encoder, torch.compile(encoder)):
        assert {tensor.name for tensor in read(module).tensors} == names


def test_a_whole_state_dict_with_tied_names_and_buffers_is_taken_and_verified(trained: Client, flux: Path) -> None:
    """Older transformers saved the embeddings of T5 twice, and the positions of CLIP."""
    pipeline = DiffusionPipeline.from_pretrained(flux)
    encoder = pipeline.text_encoder_2
    with torch.no_grad():
        encoder.shared.weight.add_(1)
    state = encoder.state_dict()
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= state.keys()
    done = trained.weights.update(state, target_module="text_encoder_2")
    assert done is not None
    assert (done.applied, done.expected) == (len(state) - 1, len(state) - 1)
    alias = {"encoder.embed_tokens.weight": state["shared.weight"] + 1}
    trained.weights.update(alias, target_module="text_encoder_2")
    trained.weights.verify({"shared.weight": state["shared.weight"] + 1}, target_module="text_encoder_2")
    with pytest.raises(TensorsRejected) as refused:
        trained.weights.update({**state, **alias}, target_module="text_encoder_2")
    assert "tied to text_encoder_2.shared.weight" in refused.value.invalid[0].reason
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    clip = pipeline.text_encoder.state_dict()
    done = trained.weights.update({**clip, **positions}, target_module="text_encoder")
    assert done is not None
    assert (done.applied, done.left_out) == (len(clip), tuple(positions))
    with pytest.raises(InvalidRequest, match="position_ids"):
        trained.weights.update(positions, target_module="text_encoder")


def test_a_compiled_module_has_the_names_of_its_own(trained: Client, flux: Path) -> None:
    done = trained.weights.update(torch.compile(FluxTransformer2DModel.from_pretrained(flux / "transformer")))
    assert done is not None
    assert done.applied == done.expected


def test_pairs_that_are_made_one_at_a_time_are_an_update(trained: Client, own: Tensors) -> None:
    new = plus(own, 0.2)
    done = trained.weights.update(iter(new.items()), bucket_bytes=SEVERAL)
    assert done is not None
    assert trained.weights.checksum()["transformer"] == digest(new)


def test_files_in_a_directory_are_an_update(trained: Client, own: Tensors, tmp_path: Path) -> None:
    new = plus(own, 0.3)
    save_file(new, tmp_path / "diffusion_pytorch_model.safetensors")
    trained.weights.update(tmp_path)
    assert trained.weights.checksum()["transformer"] == checksum(tmp_path)[tmp_path.name].sha256 == digest(new)


def test_tensors_that_do_not_lie_in_order_are_sent_in_order(trained: Client, own: Tensors) -> None:
    new = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in plus(own, 0.4).items()}
    assert not all(tensor.is_contiguous() for tensor in new.values())
    trained.weights.update(new)
    assert trained.weights.checksum()["transformer"] == digest(new)


def test_what_the_server_casts_is_verified_as_it_was_cast(trained: Client, own: Tensors) -> None:
    half = {name: (tensor + 0.1).bfloat16() for name, tensor in own.items()}
    trained.weights.update(half)
    assert trained.weights.checksum()["transformer"] == digest({name: t.float() for name, t in half.items()})


def test_a_trainer_in_fp32_verifies_a_server_in_bf16(half_server: LiveServer, own: Tensors, flux: Path) -> None:
    new = plus(own, 0.1)
    with Client(half_server.url) as client:
        client.weights.update(new, bucket_bytes=SEVERAL)
        assert client.weights.checksum()["transformer"] == digest({name: t.bfloat16() for name, t in new.items()})
        client.weights.verify(new)
        with pytest.raises(TensorsDiffer):
            client.weights.verify(own)
        client.weights.update(flux / "transformer")  # from files, in fp32 too


def test_pictures_change_with_the_weights_and_back(trained: Client, own: Tensors) -> None:
    before = picture(trained)
    trained.weights.update(plus(own, 0.1))
    assert picture(trained) != before
    trained.weights.update(own)
    assert picture(trained) == before


def test_versions_count_up_where_none_is_given(trained: Client, own: Tensors) -> None:
    trained.weights.update(own, version="41")
    done = trained.weights.update(own, bucket_bytes=SEVERAL)
    assert done is not None
    assert done.weight_version == trained.weights.version() == "42"


def test_update_from_disk_takes_only_what_is_asked_for(trained: Client, flux: Path) -> None:
    done = trained.weights.update_from_disk(flux, target_modules=["vae"], version="vae")
    assert set(done.updated) == {"vae"}
    assert trained.weights.version() == "vae"


def test_verify_names_what_differs(trained: Client, own: Tensors) -> None:
    trained.weights.verify(own)
    changed, *_ = own
    with pytest.raises(TensorsDiffer, match=rf"1 of {len(own)} tensors of transformer .*{changed}") as raised:
        trained.weights.verify({**own, changed: own[changed] + 1})
    assert (raised.value.missing, raised.value.mismatched) == ([], [changed])
    with pytest.raises(TensorsDiffer) as raised:
        trained.weights.verify({**own, "none.such": own[changed]})
    assert (raised.value.missing, raised.value.mismatched) == (["none.such"], [])


@pytest.mark.parametrize("bucket_bytes", [SEVERAL, 1 << 30])
def test_a_byte_that_changes_on_its_way_is_found(bucket_bytes: int, trained: Client, own: Tensors) -> None:
    shared, (first, *_) = Path(trained.info()["shared_memory"]), own
    corrupted: list[Path] = []

    def corrupt(progress: UpdateProgress) -> None:
        files = list(shared.glob("client-*/1.safetensors"))
        if not corrupted and files and files[0].stat().st_size > own[first].nbytes + 20_000:
            corrupted.append(files[0])  # once: the file is written again, with other tensors
            with files[0].open("r+b") as file:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
                file.write(b"\x12\x34")

    with pytest.raises(TensorsDiffer) as raised:
        trained.weights.update(own, on_progress=corrupt, bucket_bytes=bucket_bytes, route="shared")
    assert (raised.value.missing, raised.value.mismatched) == ([], [first])
    corrupted.clear()
    trained.weights.update(own, on_progress=corrupt, bucket_bytes=bucket_bytes, route="shared", verify=False)


@pytest.mark.parametrize("bucket_bytes", [SEVERAL, 1 << 30])
def test_what_the_model_cannot_take_is_named_and_nothing_is_written(
    bucket_bytes: int, trained: Client, own: Tensors
) -> None:
    before = trained.weights.checksum()
    name = list(own)[-1]
    new = plus(own, 1)
    with pytest.raises(TensorsRejected) as raised:
        trained.weights.update({**new, "none.such": torch.zeros(3)}, bucket_bytes=bucket_bytes)
    assert (raised.value.unknown, raised.value.invalid) == (["none.such"], [])
    with pytest.raises(TensorsRejected) as raised:
        trained.weights.update({**new, name: torch.zeros(3, 5, 7)}, bucket_bytes=bucket_bytes)
    assert [(tensor.name, "[3, 5, 7]" in tensor.reason) for tensor in raised.value.invalid] == [(name, True)]
    assert trained.weights.checksum() == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "no tensors"),
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], "given twice"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "sparse"),
    ],
)
def test_an_invalid_update_is_refused_before_anything_is_sent(given: Any, said: str, trained: Client) -> None:
    with pytest.raises(InvalidRequest, match=said):
        trained.weights.update(given)
    assert trained.weights.version() == "restored"


def test_a_pipeline_is_not_taken_for_one_module(trained: Client, flux: Path) -> None:
    with pytest.raises(InvalidRequest, match="give the directory of one"):
        trained.weights.update(flux)


def test_a_module_that_is_not_there_is_an_error_and_no_checksum(trained: Client) -> None:
    with pytest.raises(NotFound, match="no module refiner"):
        trained.weights.checksum(["transformer", "refiner"])
    with pytest.raises(NotFound, match="no module refiner"):
        trained.weights.checksum(["refiner"], detail=True)


def test_parts_serve_together_when_their_context_ends(trained: Client, own: Tensors, flux: Path) -> None:
    new, names = plus(own, 0.5), list(own)
    with trained.weights.begin("parts", ["transformer", "vae"], require_complete=True) as begun:
        begun.update({name: new[name] for name in names[:9]})
        begun.update({name: new[name] for name in names[9:]})
        begun.update(flux / "vae", target_module="vae")
        assert trained.weights.version() == "restored"
    assert begun.result is not None
    assert begun.result.updated == {"transformer": len(own), "vae": begun.result.applied - len(own)}
    assert begun.result.weight_version == trained.weights.version() == "parts"
    assert trained.weights.checksum()["transformer"] == digest(new)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_the_context_leaves_every_byte(
    error: type[BaseException], trained: Client, own: Tensors
) -> None:
    before = trained.weights.checksum()

    def train() -> None:
        with trained.weights.begin("never") as begun:
            begun.update(plus(own, 1))
            raise error

    with pytest.raises(error):
        train()
    assert (trained.weights.checksum(), trained.weights.version()) == (before, "restored")
    trained.weights.update(own)  # nothing is open any more


def test_ctrl_c_amid_an_update_leaves_every_byte(trained: Client, own: Tensors) -> None:
    before = trained.weights.checksum()
    size = sum(tensor.nbytes for tensor in own.values())

    def interrupt(progress: UpdateProgress) -> None:
        if progress.sent > size // 2:
            raise KeyboardInterrupt

    for route in ("shared", "http"):
        with pytest.raises(KeyboardInterrupt):
            trained.weights.update(plus(own, 1), on_progress=interrupt, bucket_bytes=SEVERAL, route=route)
        assert (trained.weights.checksum(), trained.weights.version()) == (before, "restored")


def test_an_incomplete_update_is_not_committed(trained: Client, own: Tensors) -> None:
    before = trained.weights.checksum()
    name, *_ = own
    with pytest.raises(InvalidRequest), trained.weights.begin(require_complete=True) as begun:
        begun.update({name: own[name] + 1})
    assert trained.weights.checksum() == before


def test_a_part_for_a_module_that_was_not_named_is_refused(trained: Client, flux: Path) -> None:
    with pytest.raises(InvalidRequest, match="begun for transformer"), trained.weights.begin() as begun:
        begun.update(flux / "vae", target_module="vae")


@pytest.mark.parametrize("route", ["shared", "http"])
def test_progress_only_grows_and_reaches_the_total(route: TransportName, trained: Client, own: Tensors) -> None:
    heard: list[UpdateProgress] = []
    trained.weights.update(own, on_progress=heard.append, bucket_bytes=SEVERAL, route=route)
    total = sum(tensor.nbytes for tensor in own.values())
    sent = [progress.sent for progress in heard]
    assert sent == sorted(sent)
    assert len(sent) >= len(own)
    assert heard[-1] == UpdateProgress(total, total)


def test_a_bucket_is_made_while_the_one_before_it_is_sent(trained: Client, own: Tensors) -> None:
    asked_for_third, waited = threading.Event(), []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number, pair in enumerate(own.items()):
            if number == 2:
                asked_for_third.set()
            yield pair

    def while_sent(progress: UpdateProgress) -> None:
        if not waited:
            waited.append(asked_for_third.wait(10))

    trained.weights.update(tensors(), on_progress=while_sent, bucket_bytes=1, route="http")
    assert waited == [True]


def test_tensors_go_through_shared_memory_by_themselves_and_leave_nothing_there(trained: Client, own: Tensors) -> None:
    shared = Path(trained.info()["shared_memory"])
    seen: set[str] = set()
    trained.weights.update(own, on_progress=lambda _: seen.update(p.name for p in shared.glob("client-*")))
    with pytest.raises(TensorsRejected):
        trained.weights.update({"none.such": torch.zeros(3)})
    assert len(seen) == 1
    assert [entry.name for entry in shared.iterdir()] == ["owner"]


@pytest.mark.parametrize("bucket_bytes", [SEVERAL, 1 << 30])
def test_shared_memory_that_is_full_leaves_every_byte(bucket_bytes: int, trained: Client, own: Tensors) -> None:
    before = trained.weights.checksum()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(Unavailable, match="make buckets smaller"):
            trained.weights.update(plus(own, 1), bucket_bytes=bucket_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert trained.weights.checksum() == before


def test_a_server_elsewhere_is_sent_to_over_http(tmp_path: Path) -> None:
    elsewhere = Server(tmp_path / "not-here", frozenset(), 1)
    with open_transport(elsewhere, None) as route:
        assert isinstance(route, Http)
    with pytest.raises(InvalidRequest, match="use route http"), open_transport(elsewhere, "shared"):
        pass
