"""A model path that cannot be served is refused by what is read in no time, in one sentence that says what to do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.formats.checkpoint import check_model
from safelight.formats.model_names import resolve_model
from safelight.protocol.errors import StartFailed


def safetensors(size: int = 8) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def refused(*arguments: str, **options: str) -> str:
    with pytest.raises(StartFailed) as raised:
        check_model(*arguments, **options)
    assert "\n" not in raised.value.message
    assert raised.value.message.endswith(".")
    return raised.value.message


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (None, "no model_index.json"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "JSON object"),
    ],
)
def test_a_directory_without_an_index_is_refused(index: bytes | None, said: str, tmp_path: Path) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_bytes(index)
    assert said in refused(str(tmp_path))


def test_what_only_diffusers_knows_of_a_directory_is_left_to_the_worker(tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "tags": ["diffusers", "x"], "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    check_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.safetensors", b"", "not a readable safetensors file"),
        ("a.safetensors", b"\xff" * 64, "not a readable safetensors file"),
        ("a.safetensors", (20).to_bytes(8, "little") + b"x" * 20, "not a readable safetensors file"),
        ("a.safetensors", (2).to_bytes(8, "little") + b"[]", "not a readable safetensors file"),
        ("a.safetensors", safetensors(100)[:-1], "incomplete"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.gguf", b"GGML", "not a readable GGUF file"),
        ("a.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.ckpt", b"PK", "pickled weights"),
        ("a.bin", b"PK", "pickled weights"),
    ],
)
def test_a_single_file_that_cannot_be_read_is_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refused(str(tmp_path / name))


def test_a_gguf_file_without_its_package_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x03")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "safelight[gguf]" in refused(str(tmp_path / "a.gguf"))


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(str(tmp_path / "nothing"))


def test_a_misspelt_model_is_refused_with_the_one_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "flux-dev").mkdir()
    assert "did you mean shapes?" in refused("shape")
    assert f"did you mean {tmp_path / 'flux-dev'}?" in refused(str(tmp_path / "flux_dev"))
    assert "did you mean" not in refused(str(tmp_path / "nothing"))
    assert "did you mean" not in refused(str(tmp_path / "no" / "such"))


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(safetensors())
    check_model(str(file), base="org/name", revision="main")
    assert "--base-pipeline" in refused("shapes", base="org/name")
    assert "--base-pipeline" in refused("org/name", base="org/name")
    assert "--revision" in refused("shapes", revision="main")
    assert "--revision" in refused(str(file), revision="main", base=str(resolve_model("shapes")))
    assert "no model_index.json" in refused(str(file), base=str(tmp_path))
    assert "not a directory" in refused(str(file), base=str(file))


def test_the_server_looks_at_a_model_without_importing_torch() -> None:
    program = (
        "import sys; from safelight.formats.checkpoint import check_model; check_model('shapes');"
        "sys.exit(bool({'torch', 'diffusers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", ["nothing", "./nothing", "a/b/c", "/nothing", "../a", "org/", "org/a b"])
def test_a_name_that_cannot_be_a_hub_id_is_a_path(name: str) -> None:
    assert isinstance(resolve_model(name), Path)


def test_a_hub_id_is_left_to_the_worker_unless_there_is_such_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name-1.5") == "org/name-1.5"
    check_model("org/name-1.5", revision="v1")
    (tmp_path / "org" / "name-1.5").mkdir(parents=True)
    assert resolve_model("org/name-1.5") == Path("org/name-1.5")


def test_the_embedded_model_has_a_directory() -> None:
    path = resolve_model("shapes")
    assert isinstance(path, Path)
    assert path.parts[-2:] == ("assets", "shapes")
