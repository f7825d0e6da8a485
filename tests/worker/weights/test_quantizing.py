"""A quantized model speaks of the checkpoint's weights, and draws what plain diffusers draws with rounded ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from safelight.formats.digests import tensor_digest
from safelight.protocol.config import Config
from safelight.protocol.errors import Internal, StartFailed
from safelight.protocol.replicas import Accuracy
from safelight.tests.tiny import save
from safelight.worker.accuracy.admission import admit, judge
from safelight.worker.accuracy.policy import load_policy
from safelight.worker.model.model import Model, load_model
from safelight.worker.model.modules import count_parameters
from safelight.worker.parallel.ranks import ALONE
from safelight.worker.weights.quantizing.layers import QuantizedLayer
from safelight.worker.weights.quantizing.schemes import SCHEMES, Scheme
from safelight.worker.weights.snapshot.digests import raw_bytes, tensor_digests
from safelight.worker.weights.transport.sources import TensorSource
from safelight.worker.weights.update.offload import Offloader
from safelight.worker.weights.update.rank_update import RankUpdate
from safelight.worker.weights.update.undo_log import UndoLog

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
Load = Callable[..., Model]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("flux", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def load(checkpoint: Path) -> Load:
    def loaded(quantize: str = "int8", path: Path = checkpoint, **options: Any) -> Model:
        return load_model(Config(model=str(path), device="cpu", quantize=quantize, **options))

    return loaded


def own_weights(checkpoint: Path) -> Tensors:
    return load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")


def changed(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in tensors.items()}


def digests(tensors: Tensors) -> dict[str, str]:
    return {name: tensor_digest(str(one.dtype), list(one.shape), raw_bytes(one)) for name, one in tensors.items()}


def own_digests(model: Model) -> dict[str, str]:
    layout = model.layouts["transformer"]
    found = tensor_digests(layout, [entry.name for entry in layout], lambda: None)
    return {name: one.sha256 for name, one in found.items()}


def codes(model: Model) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.pipeline.transformer.buffers()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def drawn(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    config = transformer.config
    found: torch.Tensor = transformer(
        hidden_states=torch.randn(2, 16, config.in_channels, generator=generator),
        encoder_hidden_states=torch.randn(2, 8, config.joint_attention_dim, generator=generator),
        pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=generator),
        timestep=torch.rand(2, generator=generator),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
        guidance=torch.ones(2) if config.guidance_embeds else None,
    ).sample
    return found


def rounded(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """The weight as its codes say, by other arithmetic than the layer's."""
    rows = []
    for row in weight.double():
        scale = torch.tensor(float(row.abs().max()) / (127 if scheme == "int8" else 448)).to(weight.dtype).double()
        codes = (row / scale).float()
        codes = codes.round() if scheme == "int8" else codes.to(torch.float8_e4m3fn).float()
        rows.append(codes.double() * scale)
    return torch.stack(rows)


def update(model: Model, tensors: Tensors) -> RankUpdate:
    begun = RankUpdate(model.layouts, UndoLog(CPU, 1 << 30, None))
    begun.prepare(TensorSource({"transformer": tensors}))
    return begun


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_quantized_transformer_is_the_plain_one_with_rounded_weights(
    scheme: str, load: Load, checkpoint: Path
) -> None:
    model = load(scheme)
    plain = FluxTransformer2DModel.from_pretrained(checkpoint, subfolder="transformer").eval()
    layers = {
        name: layer for name, layer in model.pipeline.transformer.named_modules() if isinstance(layer, QuantizedLayer)
    }
    assert len(layers) == model.quantized["transformer"].layers == 20
    for name, layer in layers.items():
        own = plain.get_submodule(name)
        wanted = rounded(own.weight, scheme)
        assert torch.allclose(layer.weight.double(), wanted, rtol=1e-6, atol=0)
        own.weight.copy_(wanted)
    assert torch.allclose(drawn(model.pipeline.transformer), drawn(plain), atol=1e-5)
    assert model.quantized["transformer"].bytes_after < 0.3 * model.quantized["transformer"].bytes_before


def test_a_base_in_the_checkpoint_s_precision_takes_no_memory(load: Load, checkpoint: Path) -> None:
    assert load().quantized["transformer"].base_on_host_bytes == 0
    assert load(dtype="bfloat16").quantized["transformer"].base_on_host_bytes > 0
    assert own_digests(load()) == digests(own_weights(checkpoint))


def test_the_number_of_parameters_is_the_checkpoint_s(load: Load, checkpoint: Path) -> None:
    model, numbers = load(), sum(one.numel() for one in own_weights(checkpoint).values())
    assert count_parameters(model.pipeline.transformer, model.layouts["transformer"]) == numbers


@pytest.mark.parametrize("options", [{}, {"fuse_projections": True}], ids=["plain", "fused"])
def test_an_update_is_of_full_precision_and_draws_as_a_fresh_start_does(
    options: Any, load: Load, checkpoint: Path, tmp_path: Path
) -> None:
    model, new = load(**options), changed(own_weights(checkpoint))
    before, addresses = codes(model), [one.data_ptr() for one in model.pipeline.transformer.buffers()]
    undone = update(model, new)
    undone.write()
    assert own_digests(model) == digests(new)
    assert not same(codes(model), before)
    undone.rollback()
    assert own_digests(model) == digests(own_weights(checkpoint))
    assert same(codes(model), before)
    kept = update(model, new)
    kept.write()
    kept.commit()
    other = shutil.copytree(checkpoint, tmp_path / "new")
    save_file(new, other / "transformer" / "diffusion_pytorch_model.safetensors")
    fresh = load(path=other, **options)
    assert same(codes(model), codes(fresh))
    assert torch.equal(drawn(model.pipeline.transformer), drawn(fresh.pipeline.transformer))
    assert [one.data_ptr() for one in model.pipeline.transformer.buffers()] == addresses


@pytest.mark.parametrize("at", [0, 3, 40])
def test_an_update_that_is_interrupted_leaves_the_codes_as_they_were(at: int, load: Load, checkpoint: Path) -> None:
    model, written = load(), iter(range(10_000))
    before = codes(model)

    def stop() -> None:
        if next(written) == at:
            raise InterruptedError

    begun = update(model, changed(own_weights(checkpoint)))
    with pytest.raises(InterruptedError):
        begun.write(stop)
    begun.rollback()
    assert same(codes(model), before)
    assert own_digests(model) == digests(own_weights(checkpoint))


def test_weights_that_are_updated_asleep_are_awake_as_those_of_a_fresh_start(load: Load, checkpoint: Path) -> None:
    model, awake = load(), load()
    new = changed(own_weights(checkpoint))
    offloader = Offloader([model.pipeline.transformer], CPU)
    offloader.offload(lambda: None)
    for one in (model, awake):
        begun = update(one, new)
        begun.write()
        begun.commit()
    offloader.restore(lambda: None)
    assert torch.equal(drawn(model.pipeline.transformer), drawn(awake.pipeline.transformer))


def test_an_update_that_is_not_finite_is_noticed(load: Load, checkpoint: Path) -> None:
    model, own = load(), own_weights(checkpoint)
    name = next(iter(model.layouts["transformer"].codecs))
    begun = update(model, {name: torch.full_like(own[name], torch.nan)})
    begun.write()
    assert not model.is_finite()
    begun.rollback()
    assert model.is_finite()


def test_a_checkpoint_that_is_overwritten_is_not_passed_off_as_the_weights(
    load: Load, checkpoint: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(checkpoint, tmp_path / "copy")
    model, file = load(path=copied), copied / "transformer" / "diffusion_pytorch_model.safetensors"
    other = tmp_path / "other"
    shutil.copy(file, other)
    other.replace(file)  # which leaves the old one to those who use it
    assert own_digests(model) == digests(own_weights(checkpoint))
    model = load(path=copied)
    with file.open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\0\0\0\0")
    with pytest.raises(Internal, match="was overwritten while the server used it"):
        own_digests(model)


def test_products_of_8_bits_are_near_those_of_the_weights(load: Load, checkpoint: Path) -> None:
    layer = torch.nn.Linear(64, 48).bfloat16()
    plain = load("fp8-dynamic", dtype="bfloat16").pipeline.transformer
    found = next(part for part in plain.modules() if isinstance(part, QuantizedLayer))
    rows = torch.randn(2, 3, found.in_features).bfloat16()
    wanted = torch.nn.functional.linear(rows.double(), found.weight.double(), found.bias.double())
    alone = torch.cat([found(row[None]) for row in rows])
    assert torch.equal(found(rows), alone)  # each row has its own scale
    assert ((found(rows).double() - wanted).norm() / wanted.norm()).item() < 0.05
    assert layer.weight.dtype == found.weight.dtype
    exact = found.double()(rows.double())  # the reference that compiled blocks are compared with
    assert ((exact - wanted).norm() / wanted.norm()).item() < 0.01


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("int4", "neither a scheme nor `component=scheme`; schemes are int8, fp8, fp8-dynamic"),
        ("transformer_2=int8", "no component 'transformer_2' with weights; it has"),
        ("vae=int8", r"vae \(AutoencoderKL\) has no linear layer of 1024 or more elements"),
        ("fp8-dynamic", "computes in bfloat16; give --dtype bfloat16"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_name(option: str, words: str, load: Load) -> None:
    with pytest.raises(StartFailed, match=words):
        load(option)


def test_an_inaccurate_component_is_refused_with_its_figures(load: Load) -> None:
    model = load()
    for layer in model.pipeline.transformer.modules():
        if isinstance(layer, QuantizedLayer):
            layer.scale.mul_(1.2)
    with pytest.raises(StartFailed, match=r"transformer is not accurate enough in int8: .* is 0\.\d+.* 0\.1 is all"):
        admit(model, ALONE, None)
    for distance, fault in ((0.1, None), (0.11, "is 0.11"), (float("nan"), "is nan")):
        refused = nullcontext() if fault is None else pytest.raises(StartFailed, match=fault)
        with refused:
            judge({"transformer": Accuracy(distance, 0.0, "float64")}, {"transformer": "int8"}, load_policy())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_gpu_which_divides_by_a_number_through_its_reciprocal_makes_the_bits_of_the_cpu(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update encodes on the GPU what the load has encoded on the CPU."""
    weight = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    expected = scheme.encode(weight)
    divided, plain = weight / scheme.largest, torch.Tensor.__truediv__

    def as_on_a_gpu(tensor: torch.Tensor, by: torch.Tensor | float) -> torch.Tensor:
        return plain(tensor, by) if isinstance(by, torch.Tensor) else tensor * torch.tensor(1 / by)

    monkeypatch.setattr(torch.Tensor, "__truediv__", as_on_a_gpu)
    assert not torch.equal(weight / scheme.largest, divided)
    assert all(map(torch.equal, scheme.encode(weight), expected))


def test_zeros_are_zeros_and_the_largest_value_of_a_row_stays(load: Load) -> None:
    for scheme in SCHEMES.values():
        weight = torch.tensor([[0.0, 0.0], [1.0, -8.0]])
        assert torch.allclose(scheme.decode(*scheme.encode(weight))[0], weight[0])
        assert scheme.decode(*scheme.encode(weight))[1, 1].item() == pytest.approx(-8.0)
