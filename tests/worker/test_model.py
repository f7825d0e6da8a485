"""Reading a pipeline's arguments, sizes and defaults."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
import torch

from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.worker.model.model import Model, load_model
from safelight.worker.model.pipeline_task import default_text_length
from safelight.worker.pipelines.arguments import call_arguments


def test_arguments_that_are_not_json_cannot_be_set() -> None:
    names = set(call_arguments(diffusers.FluxPipeline))
    assert {"width", "guidance_scale", "max_sequence_length", "sigmas"} <= names
    refused = {"prompt", "generator", "latents", "prompt_embeds", "output_type", "callback_on_step_end", "image"}
    assert not names & (refused | {"num_images_per_prompt"})


def test_defaults_and_types_are_the_signature_s() -> None:
    arguments = call_arguments(diffusers.WanPipeline)
    assert (arguments["num_frames"].types, arguments["num_frames"].default) == (["int"], 81)
    assert arguments["guidance_scale_2"].types == ["float", "null"]
    assert arguments["negative_prompt"].types == ["null", "str"]


@pytest.mark.parametrize(
    ("family", "multiple"),
    [("flux", 16), ("sd3", 16), ("sdxl", 8), ("wan", 16), ("qwenimage", 16), ("zimage", 16)],
)
def test_sizes_are_multiples_of_what_the_pipeline_needs(
    family: str, multiple: int, tiny_model: Callable[[str], Model]
) -> None:
    assert tiny_model(family).main.sizes.multiple == multiple


def test_a_model_that_says_its_size_only_in_its_vae_is_drawn_at_that_size(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("flux")
    assert model.main.defaults["width"] == model.pipeline.vae.config.sample_size
    assert "width" not in tiny_model("sdxl").main.defaults


def test_a_text_is_never_padded_beyond_what_all_the_tokenizers_are_made_for(
    tiny_model: Callable[[str], Model],
) -> None:
    model = tiny_model("flux")
    assert "max_sequence_length" not in model.main.defaults
    for tokenizer, limit in ((model.pipeline.tokenizer, 77), (model.pipeline.tokenizer_2, 100)):
        tokenizer.model_max_length = limit
    assert default_text_length(model.pipeline, model.main.arguments) == {"max_sequence_length": 100}


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_cpu_that_multiplies_bfloat16_runs_a_checkpoint_in_the_dtype_it_is_stored_in(
    multiplies: bool, tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": multiplies})
    expected = torch.bfloat16 if multiplies else torch.float32
    assert load_model(Config(model="shapes", device="cpu")).pipeline.transformer.dtype == expected
    assert tiny_model("flux").pipeline.transformer.dtype == torch.float32, "stored in float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(StartFailed, match="--device"):
        load_model(Config(model="shapes", device="cuda"))
