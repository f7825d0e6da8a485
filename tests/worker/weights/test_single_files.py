"""A checkpoint in one file is what diffusers makes of it, under diffusers' names."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanTransformer3DModel,
)
from diffusers.loaders import single_file_model
from safetensors.torch import load_file, save_file

from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.tests.tiny import FAMILIES, save
from safelight.tests.tiny.single_files import flux_file, sd15_file, sdxl_file, wan_tensors
from safelight.tests.tiny.stable_diffusion import build_sdxl
from safelight.worker.model.model import Model, load_model
from safelight.worker.weights.checkpoint import single_file
from safelight.worker.weights.checkpoint.files import WeightFiles


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("single")


@pytest.fixture(scope="module")
def sd15(directory: Path) -> Path:
    return save("sd15", directory)


@pytest.fixture(scope="module")
def wan(directory: Path) -> Path:
    return save("wan", directory)


def load(file: Path, base: Path | None, *, fused: bool = False, dtype: str = "float32") -> Model:
    return load_model(
        Config(
            model=str(file),
            base_pipeline=str(base) if base else None,
            device="cpu",
            dtype=dtype,  # type: ignore[arg-type]
            fuse_projections=fused,
        )
    )


def without_weights(checkpoint: Path, target: Path) -> Path:
    return shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("*.safetensors"))


def assert_named_as_in(checkpoint: Path, model: Model, *components: str) -> None:
    """Every tensor has the name, and the bytes, that it has in the directory that the file was made of."""
    for component in components:
        with WeightFiles(checkpoint / component) as files:
            layout = model.layouts[component]
            assert {entry.name for entry in layout} == set(files)
            assert [name for name in files if not torch.equal(layout.read(name), files[name][...])] == []


def test_a_whole_pipeline_in_one_file_is_loaded_as_diffusers_does(sd15: Path, tmp_path: Path) -> None:
    file = sd15_file(sd15, tmp_path / "dreams.safetensors")
    base = without_weights(sd15, tmp_path / "layout")
    plain = StableDiffusionPipeline.from_single_file(str(file), config=str(base), local_files_only=True)
    model = load(file, base)
    assert type(model.pipeline) is type(plain)
    for component in ("unet", "vae", "text_encoder"):
        wanted, found = getattr(plain, component).state_dict(), getattr(model.pipeline, component).state_dict()
        assert wanted.keys() == found.keys()
        assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    assert_named_as_in(sd15, model, "unet", "vae", "text_encoder")


def made(pipeline: DiffusionPipeline, call: dict[str, Any]) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red circle", generator=torch.Generator().manual_seed(3), output_type="pt", **call).images
    assert isinstance(picture, torch.Tensor)
    return picture


@pytest.fixture
def narrow_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' own converter of FLUX, for another width: it has that of the published models as a constant."""
    source = inspect.getsource(single_file_model.convert_flux_transformer_checkpoint_to_diffusers)
    narrowed = source.replace("inner_dim = 3072", "inner_dim = 64")
    assert narrowed != source
    names: dict[str, Any] = {"torch": torch}
    exec(narrowed, names)
    converter = names["convert_flux_transformer_checkpoint_to_diffusers"]
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", converter)


@pytest.mark.usefixtures("narrow_flux")
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_whole_file_under_its_first_authors_names_draws_what_diffusers_draws(
    family: str, directory: Path, tmp_path: Path
) -> None:
    """Both text encoders of SDXL are CLIP models; diffusers tells them apart by their width."""
    file, tied = tmp_path / f"{family}.safetensors", tmp_path / "tied.safetensors"
    if family == "sdxl":
        checkpoint, cls, denoiser = directory / "sdxl48", StableDiffusionXLPipeline, "unet"
        build_sdxl(second_width=48).save_pretrained(checkpoint)
        files = [sdxl_file(checkpoint, file)]
    else:
        checkpoint, cls, denoiser = save("flux", directory), FluxPipeline, "transformer"
        files = [flux_file(checkpoint, file), flux_file(checkpoint, tied, tied=True)]
    base, call = without_weights(checkpoint, tmp_path / "layout"), FAMILIES[family].call
    plain = cls.from_single_file(str(file), config=str(base), local_files_only=True)
    plain.text_encoder_2.eval()  # diffusers leaves a T5 in training mode, whose dropout draws another picture each time
    wanted = made(plain, call)
    assert torch.equal(wanted, made(cls.from_pretrained(checkpoint), call)), "the file is another model"
    for one in files:
        model = load(one, base)
        assert type(model.pipeline) is cls
        assert torch.equal(made(model.pipeline, call), wanted)
        assert_named_as_in(checkpoint, model, denoiser, "vae", "text_encoder", "text_encoder_2")


@pytest.mark.parametrize("fused", [False, True])
def test_a_denoiser_in_one_file_takes_the_rest_from_its_base(fused: bool, wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "denoiser.safetensors"
    save_file({name: tensor * 2 for name, tensor in wan_tensors(wan).items()}, file)
    plain = WanTransformer3DModel.from_single_file(str(file), config=str(wan), subfolder="transformer")
    layout = load(file, wan, fused=fused).layouts["transformer"]
    wanted = plain.state_dict()
    assert {entry.name for entry in layout} == wanted.keys()
    assert [name for name in wanted if not torch.equal(layout.read(name), wanted[name])] == []


def test_a_file_with_diffusers_names_is_taken_as_it_is(wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    shutil.copy(wan / "transformer" / "diffusion_pytorch_model.safetensors", file)
    assert_named_as_in(wan, load(file, wan), "transformer", "vae", "text_encoder")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_computes_as_in_diffusers(dtype: str, wan: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers import GGUFQuantizationConfig

    file = tmp_path / "denoiser.gguf"
    writer = gguf.GGUFWriter(file, "wan")
    for name, tensor in wan_tensors(wan).items():
        quantized = tensor.dim() == 2 and name.startswith("blocks.") and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    computed: torch.dtype = getattr(torch, dtype)
    plain = WanTransformer3DModel.from_single_file(
        str(file),
        config=str(wan),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=computed),
        dtype=computed,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 8, 8, dtype=computed),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 32, dtype=computed),
    }
    model = load(file, wan, dtype=dtype)
    assert torch.equal(model.pipeline.transformer(**inputs).sample, plain(**inputs).sample)
    original = load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {entry.name for entry in model.layouts["transformer"]} == original.keys()
    for name, tensor in original.items():
        assert torch.allclose(model.layouts["transformer"].read(name).float(), tensor, atol=0.05), name


def test_a_file_without_a_tensor_of_its_base_is_refused_with_what_to_give(wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "denoiser.safetensors"
    tensors = wan_tensors(wan)
    del tensors["blocks.1.self_attn.q.weight"]
    save_file(tensors, file)
    with pytest.raises(StartFailed, match=r"does not fit transformer .*tensors are missing.*--base-pipeline"):
        load(file, wan)


def test_a_file_of_another_model_is_refused_with_what_to_give(sd15: Path, wan: Path, tmp_path: Path) -> None:
    file = tmp_path / "denoiser.safetensors"
    save_file(wan_tensors(wan), file)
    with pytest.raises(StartFailed, match="--base-pipeline"):
        load(file, sd15)


def test_a_base_that_has_to_be_guessed_and_fetched_from_an_unreachable_hub_is_one_sentence(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, **options: object) -> Path:
        raise StartFailed(f"The hub cannot be reached to fetch {name}.")

    file = tmp_path / "denoiser.safetensors"
    save_file(wan_tensors(wan), file)
    monkeypatch.setattr(single_file, "download_pipeline", fail)
    with pytest.raises(
        StartFailed, match=r"cannot be reached .*belongs to Wan-AI/Wan2.1.*--base-pipeline\.$"
    ) as raised:
        load(file, None)
    assert "\n" not in raised.value.message


def test_one_file_is_one_of_the_two_denoisers_of_its_base(directory: Path, tmp_path: Path) -> None:
    base = save("wan22", directory)
    file = tmp_path / "high.safetensors"
    tensors = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, file)
    model = load(file, base)
    assert_named_as_in(base, model, "transformer_2")
    assert all(torch.equal(model.layouts["transformer"].read(name), tensor * 2) for name, tensor in tensors.items())
