"""A server with quantized weights speaks of the checkpoint's own, and has adapters beside the quantized ones."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, save_file

from safelight.protocol.config import Config
from safelight.protocol.generation import Generate, Sample
from safelight.tests.effort import chosen
from safelight.tests.live import LiveServer
from safelight.tests.tiny import save
from safelight.tests.updates.trainer import DRAWING, Trainer, changed, transformer
from safelight.tests.worker.lora.agreement import Made, Peft, arguments, distance, first_output, write_adapter
from safelight.worker.model.model import load_model
from safelight.worker.weights.snapshot.digests import raw_bytes


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()


def with_weights(checkpoint: Path, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    copied: Path = shutil.copytree(checkpoint, folder)
    save_file(tensors, copied / "transformer" / "diffusion_pytorch_model.safetensors")
    return copied


def rounded(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The transformer's weights as the server computes with them; other tests hold them to what rounding is."""
    layout = load_model(Config(model=str(checkpoint), device="cpu", quantize="int8")).layouts["transformer"]
    return {entry.name: layout.live(entry.name).clone() for entry in layout}


@pytest.mark.parametrize("ranks", chosen(1, nightly=[2]))
def test_a_quantized_server_is_updated_as_any_other_and_draws_adapters_as_peft_does(ranks: int, tmp_path: Path) -> None:
    checkpoint = save("flux", tmp_path / "tiny")
    own = transformer(checkpoint)
    new = changed(own, 0.02)
    other = with_weights(checkpoint, new, tmp_path / "new")
    flags = ["--threads", "1", "--quantize", "int8", "--tp", str(ranks), "--weights-roots", str(tmp_path)]
    with LiveServer(checkpoint, [*flags, *(["--fuse-projections"] if ranks > 1 else [])]) as server:
        trainer = Trainer(server.wait_ready(), checkpoint, ranks)
        (model,) = httpx.get(f"{server.url}/server_info").json()["models"]
        quantized = model["quantized"]["transformer"]
        assert (quantized["scheme"], quantized["accuracy"]["reference"]) == ("int8", "float64")
        assert 1e-4 < quantized["accuracy"]["relative_l2"] < 0.05
        assert quantized["bytes_after"] < 0.3 * quantized["bytes_before"]
        before, drawn = trainer.checksum()["transformer"], trainer.picture()
        assert before == checksum(own)
        refused = trainer.send({**new, "proj_out.bias": torch.zeros(1)})
        assert (refused.status_code, trainer.checksum()["transformer"], trainer.picture()) == (400, before, drawn)
        trainer.update(new)
        assert trainer.checksum()["transformer"] == checksum(new)
        if ranks == 1:  # the inputs of a layer that ranks share have scales for each rank
            _check_pictures(trainer, other, with_weights(other, rounded(other), tmp_path / "rounded"), tmp_path)
        trainer.done("/update_weights_from_disk", {"model_path": str(checkpoint)})
        assert (trainer.checksum()["transformer"], trainer.picture() == drawn) == (before, True)


def _check_pictures(trainer: Trainer, new: Path, reference: Path, folder: Path) -> None:
    """``reference`` has the weights of ``new`` as the server computes with them."""
    made = Made("first", 4, 2.0, seed=1)
    model = load_model(Config(model=str(reference), device="cpu"))
    path = write_adapter(made, model.pipeline.transformer, folder)
    peft = Peft(reference, [(made, path)])
    fields = {name: value for name, value in DRAWING.items() if name in Generate.__struct_fields__}
    call = arguments(model, Generate(request_id="reference", samples=[Sample("a red circle", 1)], **fields))

    def wanted(*uses: tuple[str, float]) -> torch.Tensor:
        with torch.no_grad():
            return peft.draw(dict(call) | {"generator": torch.Generator("cpu").manual_seed(1)}, uses)

    def drawn() -> torch.Tensor:
        (picture,) = load(trainer.picture()).values()
        return picture

    body: dict[str, Any] = {"lora_nickname": "first", "lora_path": str(path)}
    with torch.no_grad():
        fresh = load_model(Config(model=str(new), device="cpu", quantize="int8")).pipeline
        started = fresh(**(dict(call) | {"generator": torch.Generator("cpu").manual_seed(1)}))
    assert torch.equal(drawn(), first_output(started))
    assert distance(drawn(), wanted()) < 1e-5
    refused = trainer.post("/v1/set_lora", body | {"merge_mode": "merge"})
    assert refused.status_code == 400
    assert "cannot be merged into, as the weights are quantized; use merge_mode = dynamic" in refused.text
    chosen_by_itself = trainer.done("/v1/set_lora", body)
    assert chosen_by_itself["active"]["transformer"][0]["mode"] == "dynamic"
    assert distance(drawn(), wanted(("first", 1.0))) < 1e-5 < distance(wanted(), wanted(("first", 1.0)))
    assert trainer.post("/merge_lora_weights", {"target": "transformer"}).status_code == 400
    trainer.done("/v1/unload_lora", {"lora_nickname": "first"})
