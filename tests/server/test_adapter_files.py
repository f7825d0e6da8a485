"""Which file is meant by the path of an adapter, and which is refused; what is copied is the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safelight.protocol.config import Config
from safelight.protocol.errors import Forbidden, InvalidRequest, NotFound, SafelightError
from safelight.server.adapter_files import copy_adapter

Made = Callable[[Path], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


def copy(path: Path, folder: Path, **options: float) -> Path:
    """The copied files of an adapter in ``folder``, the only allowed directory."""
    target = folder.parent / "copy"
    config = Config(model="shapes", weights_roots=str(folder), max_lora_mb=1)
    source = copy_adapter(str(path), "ink", target, config, **options)
    assert source.folder == str(target)
    return target


def _named(name: str, data: bytes = b"") -> Made:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def _holding(*names: str) -> Made:
    def write(folder: Path) -> Path:
        for name in names:
            save_file({name: torch.ones(2)}, folder / name)
        return folder

    return write


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.safetensors")
    return folder / "a.safetensors"


def _with_a_huge_header(folder: Path) -> Path:
    return _named("a.safetensors", (10 << 30).to_bytes(8, "little") + b"{}")(folder)


def _too_large(folder: Path) -> Path:
    path = _named("a.safetensors")(folder)
    os.truncate(path, 11 << 30)  # without blocks on the disk
    return path


def _with_a_huge_configuration(folder: Path) -> Path:
    _named("adapter_config.json", b" " * (2 << 20))(folder)
    return _holding("adapter_model.safetensors")(folder)


def _a_link_out(folder: Path) -> Path:
    save_file({"x": torch.ones(1)}, folder.parent / "outside.safetensors")
    (folder / "adapter_model.safetensors").symlink_to(folder.parent / "outside.safetensors")
    return folder


REFUSED: dict[str, tuple[Made, type[SafelightError], str]] = {
    "missing": (lambda folder: folder / "missing.safetensors", NotFound, "There is nothing at"),
    "no path": (lambda folder: folder / "a\0b.safetensors", NotFound, "There is nothing at"),
    "too long": (lambda folder: folder / ("x" * 5000), NotFound, "There is nothing at"),
    "outside": (lambda folder: folder.parent, Forbidden, "weights-roots"),
    "a link that leads outside": (_a_link_out, Forbidden, "weights-roots"),
    "a pipe": (_pipe, InvalidRequest, "a.safetensors is not a regular file"),
    "a huge header": (_with_a_huge_header, InvalidRequest, "is not a safetensors file"),
    "a huge file": (_too_large, InvalidRequest, "at most 1 MB are allowed"),
    "empty": (_named("a.safetensors"), InvalidRequest, "is not a safetensors file"),
    "pickled": (_named("pytorch_lora_weights.bin"), InvalidRequest, "nothing else is read"),
    "pickled by name": (_named("adapter.pt"), InvalidRequest, "nothing else is read"),
    "an empty folder": (_holding(), NotFound, "has no safetensors file"),
    "a folder of pickled files": (
        lambda folder: _named("adapter_model.bin")(folder).parent, NotFound, "has no safetensors file",
    ),
    "a folder of two": (
        _holding("a.safetensors", "b.safetensors"), InvalidRequest, "several files (a.safetensors, b.safetensors)",
    ),
    "a folder of peft's and diffusers'": (
        _holding("adapter_model.safetensors", "pytorch_lora_weights.safetensors"), InvalidRequest, "several files",
    ),
    "a huge configuration": (_with_a_huge_configuration, InvalidRequest, "adapter_config.json has 3 MB"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_path_that_leads_to_no_adapter_is_refused_and_nothing_is_left(case: str, folder: Path) -> None:
    make, error, expected = REFUSED[case]
    path = make(folder)
    with pytest.raises(error) as refused:
        copy(path, folder)
    assert expected in refused.value.message
    assert not (folder.parent / "copy").exists()


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["any.safetensors"], "any.safetensors"),
        (["adapter_model.safetensors", "optimizer.safetensors"], "adapter_model.safetensors"),
        (["pytorch_lora_weights.safetensors", "optimizer.safetensors"], "pytorch_lora_weights.safetensors"),
    ],
)
def test_only_the_adapters_files_of_a_folder_are_copied(names: list[str], meant: str, folder: Path) -> None:
    copied = copy(_holding(*names)(folder), folder)
    assert (copied / "adapter_model.safetensors").read_bytes() == (folder / meant).read_bytes()


def test_a_configuration_next_to_an_unrelated_file_is_ignored(folder: Path) -> None:
    _holding("adapter_model.safetensors", "other.safetensors")(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2}))
    assert not (copy(folder / "other.safetensors", folder) / "adapter_config.json").exists()
    (folder.parent / "copy").rename(folder.parent / "first copy")
    assert (copy(folder / "adapter_model.safetensors", folder) / "adapter_config.json").exists()


def test_another_alpha_or_configuration_is_another_adapter(folder: Path, tmp_path: Path) -> None:
    config = Config(model="shapes", weights_roots=str(folder))
    path = str(_holding("adapter_model.safetensors")(folder))
    digests = [copy_adapter(path, "ink", tmp_path / f"{alpha}", config, alpha=alpha).digest for alpha in (None, 4, 8)]
    (folder / "adapter_config.json").write_text("{}")
    digests.append(copy_adapter(path, "ink", tmp_path / "configured", config).digest)
    assert len(set(digests)) == 4
    assert copy_adapter(path, "ink", tmp_path / "again", config).digest == digests[-1]
