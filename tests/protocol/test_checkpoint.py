"""A model path that cannot be served is told by its files alone, in one sentence that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from safelight.protocol.checkpoint import check_directory, check_model
from safelight.protocol.errors import StartFailed
from safelight.protocol.models import resolve_model

INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.42.1",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "guider": ["diffusers", "ClassifierFreeGuidance"],
    "image_encoder": [None, None],
    "requires_aesthetics_score": False,
}


def safetensors(size: int = 8) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    for component in ("transformer", "text_encoder", "tokenizer", "scheduler"):
        (directory / component).mkdir(parents=True)
        (directory / component / "config.json").write_text("{}")
    (directory / "guider").mkdir()
    (directory / "guider" / "guider_config.json").write_text("{}")  # all that `save_pretrained` writes of a guider
    (directory / "model_index.json").write_text(json.dumps(INDEX))
    (directory / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(safetensors())
    (directory / "text_encoder" / "model.safetensors").write_bytes(safetensors())
    return directory


def shard(pipeline: Path, *present: str) -> None:
    folder = pipeline / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = {"a": "part-1.safetensors", "b": "part-2.safetensors"}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for name in present:
        (folder / name).write_bytes(safetensors())


def pickle_only(pipeline: Path, name: str) -> None:
    (pipeline / "text_encoder" / "model.safetensors").rename(pipeline / "text_encoder" / name)


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda pipeline: (pipeline / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda pipeline: (pipeline / name).unlink()


def remove_scheduler(pipeline: Path) -> None:
    (pipeline / "scheduler" / "config.json").unlink()
    (pipeline / "scheduler").rmdir()


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (remove("model_index.json"), "no model_index.json"),
        (overwrite("model_index.json", b"{"), "cannot be read as JSON"),
        (overwrite("model_index.json", b"\xff\xfe"), "cannot be read as JSON"),
        (overwrite("model_index.json", b"[]"), "no JSON object"),
        (remove_scheduler, "lacks its component scheduler"),
        (remove("transformer/config.json"), "transformer has no config.json"),
        (overwrite("transformer/config.json", b"nonsense"), "cannot be read as JSON"),
        (remove(WEIGHTS), "transformer has no weights"),
        (overwrite(WEIGHTS, b""), "no readable safetensors file"),
        (overwrite(WEIGHTS, b"\xff" * 64), "no readable safetensors file"),
        (overwrite(WEIGHTS, (20).to_bytes(8, "little") + b"x" * 20), "no readable safetensors file"),
        (overwrite(WEIGHTS, (2).to_bytes(8, "little") + b"[]"), "no readable safetensors file"),
        (overwrite(WEIGHTS, safetensors(100)[:-1]), "incomplete"),
        (lambda pipeline: pickle_only(pipeline, "pytorch_model.bin"), "only pickled weights"),
        (lambda pipeline: pickle_only(pipeline, "model.pt"), "only pickled weights"),
        (lambda pipeline: pickle_only(pipeline, "model.ckpt"), "only pickled weights"),
        (lambda pipeline: shard(pipeline, "part-1.safetensors"), "part-2.safetensors"),
        (overwrite(WEIGHTS + ".index.json", b"{}"), "no weight_map"),
    ],
)
def test_a_broken_pipeline_is_refused_with_one_sentence(
    pipeline: Path, spoil: Callable[[Path], object], told: str
) -> None:
    check_directory(pipeline)
    spoil(pipeline)
    with pytest.raises(StartFailed) as raised:
        check_directory(pipeline)
    assert told in raised.value.message
    assert "\n" not in raised.value.message
    assert raised.value.message.endswith(".")


def test_sharded_weights_are_whole_when_every_part_is_there(pipeline: Path) -> None:
    shard(pipeline, "part-1.safetensors", "part-2.safetensors")
    check_directory(pipeline)


def test_pickled_weights_beside_safetensors_are_never_looked_at(pipeline: Path) -> None:
    (pipeline / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"evil")
    check_directory(pipeline)


def test_a_path_that_does_not_exist_or_is_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="does not exist"):
        check_model(str(tmp_path / "nothing"))
    (tmp_path / "model.safetensors").write_bytes(safetensors())
    with pytest.raises(StartFailed, match="is a file"):
        check_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["nothing", "./nothing", "a/b/c", "/nothing", "../a", "org/", "org/a b"])
def test_a_name_that_can_be_no_hub_id_is_a_path(name: str) -> None:
    assert isinstance(resolve_model(name), Path)


def test_a_hub_id_is_left_to_the_worker_unless_there_is_such_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name-1.5") == "org/name-1.5"
    check_model("org/name-1.5")
    (tmp_path / "org" / "name-1.5").mkdir(parents=True)
    assert resolve_model("org/name-1.5") == Path("org/name-1.5")


def test_the_embedded_model_has_a_directory() -> None:
    path = resolve_model("shapes")
    assert isinstance(path, Path)
    assert path.parts[-2:] == ("assets", "shapes")
