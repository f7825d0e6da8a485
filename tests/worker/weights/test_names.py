"""A library's whole state dict finds every tensor of a checkpoint, once, under the checkpoint's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from safelight.client.checksum import ModuleChecksum, checksum
from safelight.tests.tiny import save
from safelight.worker.model.model import Model
from safelight.worker.weights.checkpoint.aliases import by_checkpoint_names, names_of
from safelight.worker.weights.checkpoint.loader import load_component


@pytest.mark.parametrize("family", ["flux", "qwenimage", "wan"])
def test_every_module_of_a_plain_pipeline_is_whole_by_its_state_dict_and_buffers(
    family: str, tiny_model: Callable[[str], Model], tmp_path: Path
) -> None:
    model, plain = tiny_model(family), DiffusionPipeline.from_pretrained(save(family, tmp_path))
    for module, layout in model.layouts.items():
        part = plain.components[module]
        assert isinstance(part, nn.Module)
        state = part.state_dict()
        buffers = {name: buffer for name, buffer in part.named_buffers() if name not in state}
        named = by_checkpoint_names({module: state | buffers}, model.layouts)
        assert set(named.tensors[module]) == {entry.name for entry in layout}
        assert set(named.left_out) == set(buffers)
        assert len(named.tied) == len(state) - len(layout)
        for tied in named.tied:
            assert torch.equal(named.tensors[module][tied.known], tied.tensor)
        for name, tensor in named.tensors[module].items():
            assert torch.equal(tensor, layout.read(name)), "the same tensor, not only the same name"


def test_names_that_nobody_knows_are_left_to_be_refused(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("flux")
    named = by_checkpoint_names({"transformer": {"nobody.weight": torch.zeros(1)}, "unet": {}}, model.layouts)
    assert named.tensors == {"transformer": {"nobody.weight": torch.zeros(1)}, "unet": {}}
    assert names_of(model.pipeline.vae, model.layouts["vae"]).aliases == {}


def test_buffers_that_older_versions_of_a_library_saved_are_neither_loaded_nor_compared(tmp_path: Path) -> None:
    """``position_ids`` are in the text encoders of Stable Diffusion 1.5 and XL; transformers reads over them."""
    folder = save("flux", tmp_path) / "text_encoder"
    before = checksum(folder, detail=True)["text_encoder"]
    tensors = load_file(folder / "model.safetensors")
    name = "text_model.embeddings.position_ids"
    save_file({**tensors, name: torch.arange(77)[None]}, folder / "model.safetensors", {"format": "pt"})
    layout = load_component(CLIPTextModel, folder, dtype=torch.float32, device=torch.device("cpu")).layout
    assert {entry.name for entry in layout} == set(tensors)
    assert layout.names.leaves_out(name)
    server = ModuleChecksum(before.sha256, before.tensors, dict(layout.names.aliases), layout.names.ignored)
    assert checksum(folder, detail=True, like={"text_encoder": server})["text_encoder"] == before
