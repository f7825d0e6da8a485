"""An update changes everything that it names, on every rank of every replica, and the way back is bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.client.checksum import checksum
from safelight.formats.digests import tensor_digest
from safelight.worker.weights.snapshot.digests import raw_bytes

from .trainer import Tensors, Trainer, changed, transformer


def digests(tensors: Tensors) -> dict[str, str]:
    return {
        name: tensor_digest(str(tensor.dtype), tuple(tensor.shape), raw_bytes(tensor))
        for name, tensor in tensors.items()
    }


def test_the_server_s_checksum_is_the_files(trainer: Trainer) -> None:
    assert trainer.checksum() == {name: module.sha256 for name, module in checksum(trainer.directory).items()}


def test_an_update_changes_checker_checksum_and_picture_and_all_of_them_back(trainer: Trainer) -> None:
    before, picture = trainer.checksum(), trainer.picture()
    own = transformer(trainer.directory)
    new = changed(own)
    reported = trainer.update(new, weight_version="step-1")
    assert (reported["applied"], reported["expected"], reported["weight_version"]) == (len(new), len(new), "step-1")
    assert reported["ranks"] == sum(len(trainer.rank_processes(replica)) for replica in range(len(trainer.replicas())))
    trainer.done("/update_weights_from_tensor_checker", {"expected_named_tensors_sha256": digests(new)})
    refused = trainer.post("/update_weights_from_tensor_checker", {"expected_named_tensors_sha256": digests(own)})
    assert refused.status_code == 400
    assert set(refused.json()["mismatched"]) == set(own)
    after = trainer.checksum()
    assert {name for name in before if after[name] != before[name]} == {"transformer"}
    drawn = trainer.draw()
    assert drawn["weight_version"] == "step-1"
    assert trainer.picture() != picture
    trainer.restore()
    assert trainer.checksum() == before
    assert trainer.picture() == picture


def test_what_is_cast_is_cast_as_torch_casts_it(trainer: Trainer) -> None:
    name, own = next(iter(transformer(trainer.directory).items()))
    half = {name: (own + 0.1).bfloat16()}
    trainer.update(half)
    expected = digests({name: half[name].float()})
    trainer.done("/update_weights_from_tensor_checker", {"expected_named_tensors_sha256": expected})
    trainer.restore()


def test_a_file_in_shared_memory_is_an_update(trainer: Trainer) -> None:
    new = changed(transformer(trainer.directory), 0.25)
    file = trainer.shared() / "mine.safetensors"
    save_file(new, file)
    reported = trainer.done("/update_weights_from_tensor", {"shared": {"path": str(file)}, "weight_version": "shared"})
    assert reported["applied"] == len(new)
    file.unlink()
    trainer.done("/update_weights_from_tensor_checker", {"expected_named_tensors_sha256": digests(new)})
    trainer.restore()


def test_details_name_every_tensor_with_dtype_and_shape(trainer: Trainer) -> None:
    reported = trainer.done("/get_weights_checksum", {"module_names": ["transformer"], "detail": True})
    own = transformer(trainer.directory)
    tensors = reported["modules"]["transformer"]["tensors"]
    assert {name: tensor["sha256"] for name, tensor in tensors.items()} == digests(own)
    assert {name: tensor["shape"] for name, tensor in tensors.items()} == {n: list(t.shape) for n, t in own.items()}
    assert trainer.done("/get_weights_checksum", {"module_names": ["nothing"]}) == {"nothing": "not_found"}


def test_parts_are_one_update_and_nothing_is_drawn_between_them(trainer: Trainer) -> None:
    before = trainer.checksum()
    new = changed(transformer(trainer.directory), 0.5)
    names = list(new)
    update_id = trainer.done("/begin_weights_update", {"weight_version": "parts"})["update_id"]
    trainer.update({name: new[name] for name in names[:5]}, update_id=update_id)
    early = trainer.post("/commit_weights_update", {"update_id": update_id, "require_complete": True})
    assert early.status_code == 400
    trainer.update({name: new[name] for name in names[5:]}, update_id=update_id)
    reported = trainer.done("/commit_weights_update", {"update_id": update_id, "require_complete": True})
    assert (reported["applied"], reported["weight_version"]) == (len(new), "parts")
    assert trainer.checksum() != before
    trainer.restore()
    assert trainer.checksum() == before


def test_an_update_that_is_aborted_leaves_every_byte(trainer: Trainer) -> None:
    before = trainer.checksum()
    update_id = trainer.done("/begin_weights_update", {})["update_id"]
    trainer.update(changed(transformer(trainer.directory)), update_id=update_id)
    trainer.update(changed(transformer(trainer.directory), 0.7), update_id=update_id)  # the same tensors once more
    trainer.done("/abort_weights_update", {"update_id": update_id})
    assert trainer.checksum() == before
    assert trainer.send({}, update_id=update_id).status_code == 400


def test_an_empty_part_is_legal_and_changes_nothing(trainer: Trainer) -> None:
    before = trainer.done("/get_weights_checksum", {"detail": True})
    reported = trainer.update({}, weight_version="nothing")
    assert reported["applied"] == 0
    assert trainer.done("/get_weights_checksum", {"detail": True}) == before


def test_versions_count_up_where_none_is_given(trainer: Trainer) -> None:
    name, own = next(iter(transformer(trainer.directory).items()))
    trainer.update({name: own}, weight_version="41")
    assert trainer.update({name: own})["weight_version"] == "42"
    assert trainer.draw()["weight_version"] == "42"


@pytest.mark.parametrize("wanted", [["transformer"], ["vae", "text_encoder_2"]])
def test_only_the_modules_that_are_asked_for_come_from_disk(
    wanted: list[str], trainer: Trainer, checkpoint: Path
) -> None:
    reported = trainer.done("/update_weights_from_disk", {"model_path": str(checkpoint), "target_modules": wanted})
    assert set(reported["updated"]) == set(wanted)


def test_half_of_a_checkpoint_says_so_unless_it_is_asked_for(alone: Trainer, checkpoint: Path, tmp_path: Path) -> None:
    before, own = alone.checksum(), transformer(checkpoint)
    lost, *rest = own
    folder = checkpoint.parent / "half" / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({name: own[name] + 1 for name in rest}, file)
    for path in (folder, folder.parent):
        answer = alone.post("/update_weights_from_disk", {"model_path": str(path)})
        assert answer.status_code == 400
        assert (answer.json()["missing"], answer.json()["error"]["field"]) == ([lost], "require_complete")
        assert "1 tensors are missing" in answer.json()["message"]
    assert alone.checksum() == before
    strict = {"target_modules": ["transformer"], "require_complete": True}
    assert alone.post("/update_weights_from_disk", {"model_path": str(file), **strict}).status_code == 400
    for body in ({"model_path": str(folder), "require_complete": False}, {"model_path": str(file)}):
        assert alone.done("/update_weights_from_disk", body)["applied"] == len(rest)
        expected = {**digests({name: own[name] + 1 for name in rest}), **digests({lost: own[lost]})}
        alone.done("/update_weights_from_tensor_checker", {"expected_named_tensors_sha256": expected})
        alone.restore()
    assert alone.checksum() == before


def test_a_prompt_is_encoded_anew_when_its_encoder_has_changed(trainer: Trainer) -> None:
    picture = trainer.picture()
    folder = trainer.directory / "text_encoder_2"
    own = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    new = {name: tensor + 0.5 * torch.randn(tensor.shape, generator=generator) for name, tensor in own.items()}
    reported = trainer.update(new, target_module="text_encoder_2", flush_cache=False)
    assert reported["invalidated"] == ["prompt_embeddings"]
    assert trainer.picture() != picture
    trainer.restore()
    assert trainer.picture() == picture


def test_one_component_s_files_are_for_the_module_that_their_folder_is_called_by(
    alone: Trainer, checkpoint: Path
) -> None:
    for path in (checkpoint / "vae", checkpoint / "vae" / "diffusion_pytorch_model.safetensors"):
        reported = alone.done("/update_weights_from_disk", {"model_path": str(path)})
        assert list(reported["updated"]) == ["vae"]
    folder = checkpoint.parent / "unnamed"
    folder.mkdir()
    save_file(transformer(checkpoint), folder / "diffusion_pytorch_model.safetensors")
    answer = alone.post("/update_weights_from_disk", {"model_path": str(folder)})
    assert (answer.status_code, "target_modules" in answer.json()["message"]) == (400, True)
    reported = alone.done("/update_weights_from_disk", {"model_path": str(folder), "target_modules": ["transformer"]})
    assert list(reported["updated"]) == ["transformer"]
