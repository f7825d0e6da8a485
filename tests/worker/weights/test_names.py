"""A library's whole state dict finds every tensor of a checkpoint, once, under the checkpoint's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from safelight.tests.tiny import save
from safelight.worker.model import Model
from safelight.worker.weights.names import by_checkpoint_names, names_of


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
