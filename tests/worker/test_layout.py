"""Every rank has its part of a checkpoint, and all together have the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.tests.ranks import on_ranks
from safelight.tests.tiny import save
from safelight.tests.worker.reading_back import CPU, computes_with_its_part, planned, reads_back
from safelight.worker.model.modules import count_parameters
from safelight.worker.parallel.ranks import Ranks
from safelight.worker.weights.checkpoint.layout import Entry, Layout
from safelight.worker.weights.checkpoint.loader import CannotLoad, load_component

PLANNED = (
    "flux", "flux2", "sd3", "qwenimage", "qwenimage_edit", "zimage", "wan", "wan22", "ltx", "hunyuan_video",
    "hunyuan_video15",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("layout")
    return {name: save(name, directory) for name in PLANNED}


@pytest.mark.parametrize(("size", "fused"), [(1, True), (2, False), (4, True)])
def test_the_ranks_together_hold_every_byte_of_the_files(size: int, fused: bool, checkpoints: dict[str, Path]) -> None:
    on_ranks(size, reads_back, checkpoints, fused)


def test_a_pipeline_computes_with_this_rank_s_part(checkpoints: dict[str, Path]) -> None:
    on_ranks(2, computes_with_its_part, checkpoints)


def test_a_degree_that_does_not_divide_the_heads_is_refused_with_those_that_do(checkpoints: dict[str, Path]) -> None:
    cls, family = planned(checkpoints["flux"])["transformer"]
    with pytest.raises(
        CannotLoad, match=r"the transformer .*among 3 ranks, because its num_attention_heads is 4; --tp can be 1, 2, 4$"
    ):
        load_component(
            cls,
            checkpoints["flux"] / "transformer",
            dtype=torch.float32,
            device=CPU,
            family=family,
            ranks=Ranks(rank=0, size=3),
        )


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_parameters_are_counted_over_all_ranks(name: str, checkpoints: dict[str, Path]) -> None:
    cls, family = planned(checkpoints[name])["transformer"]
    folder = checkpoints[name] / "transformer"
    expected = sum(parameter.numel() for parameter in cls.from_pretrained(folder).parameters())
    for size, fused in ((1, True), (2, False), (2, True)):
        ranks = Ranks(rank=0, size=size)
        loaded = load_component(cls, folder, dtype=torch.float32, device=CPU, family=family, ranks=ranks, fused=fused)
        assert count_parameters(loaded.module, loaded.layout) == expected


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = checkpoints["flux"] / "transformer"
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    del tensors["proj_out.weight"]
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    cls, family = planned(checkpoints["flux"])["transformer"]
    with pytest.raises(CannotLoad, match=r"1 missing \['proj_out.weight'\]"):
        load_component(cls, tmp_path, dtype=torch.float32, device=CPU, family=family)


class Watched:
    """A whole tensor that notes what is read of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.read = tensor, 0

    def __getitem__(self, index: Any) -> torch.Tensor:
        found = self.tensor[index]
        self.read += found.numel()
        return found


def test_a_rank_reads_no_more_of_a_file_than_it_keeps() -> None:
    from safelight.worker.parallel.plan import Shard

    module = torch.nn.Linear(8, 3, bias=False)
    layout = Layout(module, [Entry("w", "weight", (3, 16), Shard(1, (4, 12)))], Ranks(rank=1, size=2))
    file = Watched(torch.arange(48.0).reshape(3, 16))
    layout.write("w", file)
    assert file.read == 24
    assert module.weight[0].tolist() == [2, 3, 10, 11, 12, 13, 14, 15]


def test_a_tensor_of_another_shape_leaves_what_was_there() -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        Layout.whole(module).write("weight", torch.zeros(2, 3))
    assert torch.equal(module.weight, before)
