"""A replica loads every component that diffusers loads; an incomplete one is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import CLIPImageProcessor

from safelight.protocol.errors import StartFailed
from safelight.tests.tiny import FAMILIES, save
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.weights.checkpoint.pipeline import LoadedPipeline, load_pipeline

CPU = torch.device("cpu")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("sd15", tmp_path_factory.mktemp("components"))


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def load(checkpoint: Path, variant: str | None = None, *, fused: bool = False) -> LoadedPipeline:
    return load_pipeline(checkpoint, torch.float32, CPU, ALONE, fused=fused, variant=variant)


def assert_loads_what_diffusers_loads(checkpoint: Path, variant: str | None = None) -> None:
    plain = DiffusionPipeline.from_pretrained(
        checkpoint, variant=variant, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    loaded = load(checkpoint, variant)
    assert {name: type(part) for name, part in loaded.pipeline.components.items()} == {
        name: type(part) for name, part in plain.components.items()
    }
    for name, part in plain.components.items():
        if isinstance(part, nn.Module):
            assert_same(part, loaded.pipeline.components[name])
            assert {entry.own or entry.tensor for entry in loaded.layouts[name]} <= set(part.state_dict())


def assert_same(plain: nn.Module, own: nn.Module) -> None:
    wanted, found = plain.state_dict(), own.state_dict()
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def change_index(checkpoint: Path, **entries: Any) -> None:
    file = checkpoint / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def a_pointer_in_a_variant_that_nobody_asked_for(checkpoint: Path) -> None:
    for name in (UNET, TEXT):
        file = checkpoint / name
        file.with_name(f"{file.stem}.fp16.safetensors").write_bytes(POINTER)
    (checkpoint / "unet" / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors").write_bytes(POINTER)
    (checkpoint / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")


def files_that_the_other_library_would_load(checkpoint: Path) -> None:
    (checkpoint / "unet" / "model.safetensors").write_bytes(POINTER)
    (checkpoint / "text_encoder" / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    (checkpoint / "text_encoder" / "ema.safetensors").write_bytes(POINTER)
    (checkpoint / "tokenizer" / "model.safetensors").write_bytes(POINTER)
    (checkpoint / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"evil")


def lists_of_two_that_are_not_components(checkpoint: Path) -> None:
    change_index(
        checkpoint,
        tags=["diffusers", "text-to-image"],
        authors=["transformers", "BertModel"],
        resolution=[64, 64],
        license=["apache-2.0", "mit"],
    )


def a_component_that_the_class_does_not_take(checkpoint: Path) -> None:
    change_index(checkpoint, transformer=["diffusers", "FluxTransformer2DModel"])
    (checkpoint / "transformer").mkdir()
    (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)


def a_tokenizer_of_the_tokenizers_backend(checkpoint: Path) -> None:
    change_index(checkpoint, tokenizer=["transformers", "TokenizersBackend"])


def an_image_processor(checkpoint: Path) -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    processor.save_pretrained(checkpoint / "feature_extractor")
    change_index(checkpoint, feature_extractor=["transformers", type(processor).__name__])


def a_component_in_the_root(checkpoint: Path) -> None:
    (checkpoint / "scheduler" / "scheduler_config.json").rename(checkpoint / "scheduler_config.json")
    (checkpoint / "scheduler").rmdir()


def a_file_beside_the_index_that_diffusers_takes(checkpoint: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    (checkpoint / UNET).unlink()
    unet.save_pretrained(checkpoint / "unet", max_shard_size="50KB")
    assert len(list((checkpoint / "unet").glob("*.safetensors"))) > 2
    (checkpoint / UNET).write_bytes(POINTER)


def an_index_beside_the_file_that_transformers_takes(checkpoint: Path) -> None:
    (checkpoint / f"{TEXT}.index.json").write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))


def weights_that_the_configuration_names(checkpoint: Path) -> None:
    (checkpoint / TEXT).rename(checkpoint / "text_encoder" / "weights.safetensors")
    change_config(checkpoint / "text_encoder", transformers_weights="weights.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        a_pointer_in_a_variant_that_nobody_asked_for,
        files_that_the_other_library_would_load,
        lists_of_two_that_are_not_components,
        a_component_that_the_class_does_not_take,
        a_tokenizer_of_the_tokenizers_backend,
        an_image_processor,
        a_component_in_the_root,
        a_file_beside_the_index_that_diffusers_takes,
        an_index_beside_the_file_that_transformers_takes,
        weights_that_the_configuration_names,
    ],
    ids=lambda change: change.__name__,
)
def test_an_odd_checkpoint_that_diffusers_loads_is_not_refused(
    checkpoint: Path, change: Callable[[Path], None]
) -> None:
    change(checkpoint)
    assert_loads_what_diffusers_loads(checkpoint)


def test_layers_given_as_a_list_of_two_are_not_a_component(tmp_path: Path) -> None:
    checkpoint = save("sd15_pag", tmp_path)
    change_index(checkpoint, pag_applied_layers=["mid", "up"])
    assert_loads_what_diffusers_loads(checkpoint)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX whose weights, in parts, are of the variant fp16 alone, except for those of the VAE, which has none."""
    directory = tmp_path_factory.mktemp("variants") / "flux"
    pipeline = FAMILIES["flux"].build()
    pipeline.to(torch.float16).save_pretrained(directory, variant="fp16", max_shard_size="40KB")
    shutil.rmtree(directory / "vae")
    pipeline.vae.to(torch.float32).save_pretrained(directory / "vae")
    return directory


def test_a_variant_is_loaded_where_there_are_files_of_it(variants: Path) -> None:
    assert_loads_what_diffusers_loads(variants, "fp16")


def test_the_layout_reads_a_variant_in_parts_as_diffusers_does(variants: Path) -> None:
    plain = DiffusionPipeline.from_pretrained(variants, variant="fp16", dtype=torch.float32, local_files_only=True)
    layout = load(variants, "fp16", fused=True).layouts["transformer"]
    wanted = plain.transformer.state_dict()
    assert {entry.name for entry in layout} == wanted.keys()
    assert all(torch.equal(layout.read(name), wanted[name]) for name in wanted)


def test_weights_of_a_variant_alone_are_refused_with_its_flag(variants: Path) -> None:
    with pytest.raises(StartFailed, match=r"weights of the variant fp16 only.*--variant fp16"):
        load(variants)


def test_a_variant_that_no_component_has_is_refused(saved: Path) -> None:
    with pytest.raises(StartFailed, match=r"No component .* variant 'fp16'"):
        load(saved, "fp16")


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).unlink()


def rename(name: str, new: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).rename(checkpoint / new)


def in_parts(checkpoint: Path) -> None:
    a_file_beside_the_index_that_diffusers_takes(checkpoint)
    next(iter((checkpoint / "unet").glob("*-00002-of-*.safetensors"))).unlink()


def pickled(new: str) -> Callable[[Path], object]:
    return rename(TEXT, f"text_encoder/{new}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda checkpoint: shutil.rmtree(checkpoint / "scheduler"), "lacks its component scheduler"),
        (lambda checkpoint: shutil.rmtree(checkpoint / "unet"), "lacks its component unet"),
        (remove("unet/config.json"), "unet has no config.json"),
        (overwrite("unet/config.json", b"nonsense"), "cannot be read as JSON"),
        (remove(UNET), "unet has no weights"),
        (overwrite(UNET, POINTER), "pointer of git-lfs"),
        (overwrite(UNET, b""), "not a readable safetensors file"),
        (lambda checkpoint: (checkpoint / UNET).write_bytes((checkpoint / UNET).read_bytes()[:-1]), "is incomplete"),
        (pickled("pytorch_model.bin"), "only pickled weights"),
        (pickled("model.ckpt"), "only pickled weights"),
        (in_parts, "00002-of"),
        (overwrite(f"{UNET}.index.json", b"{}"), "no weight_map"),
        (lambda checkpoint: change_index(checkpoint, unet=["diffusers", "NoSuchUNet"]), "'NoSuchUNet'"),
        (lambda checkpoint: change_index(checkpoint, unet=["nowhere", "UNet"]), "'nowhere'"),
        (lambda checkpoint: change_index(checkpoint, unet="UNet"), "unet .* has no class"),
    ],
)
def test_a_broken_component_that_would_be_loaded_is_refused_in_one_sentence(
    checkpoint: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(checkpoint)
    with pytest.raises(StartFailed, match=said) as raised:
        load(checkpoint)
    assert "\n" not in raised.value.message
    assert raised.value.message.endswith(".")
