"""Ranks that share a denoiser's tokens or rows compute what one computes; models that cannot are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, LTXVideoTransformer3DModel, PixArtTransformer2DModel

from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.tests.effort import chosen
from safelight.tests.ranks import on_mesh
from safelight.tests.tiny import save
from safelight.tests.worker import dividing, splitting
from safelight.worker.model.model import load_model
from safelight.worker.parallel.ranks import Ranks
from safelight.worker.parallel.sequence import CannotSplit, check_split


@pytest.mark.parametrize("sizes", chosen({"sp": 2}, nightly=[{"sp": 2, "tp": 2}, {"sp": 4}]), ids=str)
def test_ranks_that_share_tokens_draw_what_one_draws(sizes: dict[str, int], tmp_path: Path) -> None:
    names = chosen("flux", "qwenimage", "wan", nightly=["flux2", "wan22"])
    on_mesh(sizes, splitting.draws_as_one_rank, [splitting.drawn_by_one_rank(name, tmp_path) for name in names])


@pytest.mark.parametrize("sizes", chosen({"cfg": 2}, nightly=[{"cfg": 2, "sp": 2}, {"cfg": 2, "tp": 2}]), ids=str)
def test_ranks_that_share_rows_compute_what_one_computes(sizes: dict[str, int], tmp_path: Path) -> None:
    names = ["flux"] if "sp" in sizes else ["sd3", "zimage"]
    on_mesh(sizes, dividing.divides_rows, [splitting.drawn_by_one_rank(name, tmp_path) for name in names])


def test_a_model_whose_tokens_cannot_be_shared_is_refused_with_what_it_lacks() -> None:
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=4)
        ltx = LTXVideoTransformer3DModel(num_layers=1)
        pixart = PixArtTransformer2DModel(num_layers=1)
    check_split(flux, 1, 4)
    check_split(flux, 2, 2)
    with pytest.raises(CannotSplit, match=r"because its num_attention_heads is 4; --ulysses can be 1, 2, 4$"):
        check_split(flux, 1, 3)
    with pytest.raises(CannotSplit, match=r"each of 2 tensor-parallel ranks has 2 heads; --ulysses can be 1, 2$"):
        check_split(flux, 2, 4)
    with pytest.raises(
        CannotSplit, match="no context-parallel plan for PixArtTransformer2DModel; serve it with --ulys"
    ):
        check_split(pixart, 1, 2)
    with pytest.raises(
        CannotSplit, match=r"the attention masks of LTXVideoTransformer3DModel have a row for each head"
    ):
        check_split(ltx, 1, 2)


def test_a_start_with_ranks_that_cannot_share_tokens_is_one_sentence_that_names_the_component(tmp_path: Path) -> None:
    config = Config(model=str(save("flux", tmp_path)), device="cpu", ulysses=3)
    with pytest.raises(StartFailed) as refused:
        load_model(config, splitting.CPU, sequence=Ranks(0, 3))
    assert refused.value.message.endswith(
        "could not be loaded: the transformer cannot share its tokens: 3 ranks cannot share the attention "
        "of FluxTransformer2DModel, because its num_attention_heads is 4; --ulysses can be 1, 2, 4."
    )
