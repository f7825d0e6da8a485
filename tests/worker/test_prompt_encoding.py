"""An encode-only request returns what the pipeline's own ``encode_prompt`` gives, and what follows finds it cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline
from msgspec.structs import replace
from torch import nn

from safelight.protocol.errors import InvalidRequest
from safelight.tests.worker.test_pipelines import PROMPTS, plain, request
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.model.model import Model
from safelight.worker.model.modules import modules
from safelight.worker.pipelines.components import DENOISERS
from safelight.worker.requests.prompt_encoding import Embeddings, returned_names
from safelight.worker.requests.sample import SampleRun

TEXT = {"max_sequence_length": 64}

EXPECTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "flux": ({"prompt_2": None, **TEXT}, ("prompt_embeds", "pooled_prompt_embeds", "text_ids")),
    "wan": ({"negative_prompt": "blurry", **TEXT}, ("prompt_embeds", "negative_prompt_embeds")),
    "zimage": ({"max_sequence_length": 512}, ("prompt_embeds.0",)),
}
"""Arguments of ``encode_prompt`` besides the prompt, and the names of the tensors that it returns."""


def encode(model: Model, name: str, returns: Any, batcher: Batcher, **changes: Any) -> Mapping[str, torch.Tensor]:
    asked = replace(request(name, 0), encode=returns, **changes)
    run = SampleRun(model, asked, 0, lambda *_: None, lambda _: None)
    batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    if run.coroutine.error is not None:
        raise run.coroutine.error
    assert run.embeddings is not None
    return run.embeddings


def calls_of(model: Model, chosen: Callable[[str], bool]) -> list[str]:
    """The names of the components that are called from now on, if ``chosen``."""
    seen: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    for name, module in modules(model.pipeline).items():
        if chosen(name):
            part: nn.Module = module
            part.register_forward_pre_hook(note(name))
    return seen


@pytest.mark.parametrize("name", EXPECTED)
def test_embeddings_are_bitwise_those_of_the_pipeline_s_own_method(
    name: str, tiny_model: Callable[[str], Model]
) -> None:
    model = tiny_model(name)
    arguments, names = EXPECTED[name]
    method: Any = model.main.pipeline.encode_prompt
    returned = method(PROMPTS[0], **arguments)
    wanted = [one for value in returned for one in (value if isinstance(value, list) else [value])]
    denoised = calls_of(model, lambda called: called in DENOISERS)
    changes = {"negative_prompt": "blurry"} if "negative_prompt" in arguments else {}
    found = encode(model, name, "embeddings", Batcher(max_batch=4, max_tokens=10**6), **changes)
    assert denoised == []
    assert tuple(found)[: len(names)] == names
    for key, tensor in zip(names, wanted, strict=False):
        assert torch.equal(found[key], tensor), key


def test_a_prompt_that_was_encoded_is_not_encoded_again_to_draw_it(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("flux")
    expected = plain(model, request("flux", 0))
    batcher = Batcher(max_batch=4, max_tokens=10**6, resources=ForwardResources(cache=PromptCache(10**8)))
    assert encode(model, "flux", "cache", batcher) == {}
    encoded = calls_of(model, lambda called: called.startswith("text_encoder"))
    run = SampleRun(model, request("flux", 0), 0, lambda *_: None, lambda _: None)
    batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    assert encoded == []
    assert torch.equal(run.coroutine.result, expected)


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        ("LongCatImagePipeline", "prompt_embeds text_ids"),  # returns prompt_embeds.to(self.device)
        (
            "PRXPipeline",  # the negative ones are expressions with a condition
            "prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask",
        ),
        ("VisualClozeGenerationPipeline", "prompt_embeds pooled_prompt_embeds text_ids"),  # a function within it
        ("LattePipeline", "prompt_embeds negative_prompt_embeds"),  # returns in a branch, too
    ],
)
def test_tensors_have_the_names_of_what_the_method_returns_at_its_end(cls: str, names: str) -> None:
    assert returned_names(getattr(diffusers, cls)) == names.split()


def test_a_pipeline_without_the_method_says_what_to_ask_for() -> None:
    with pytest.raises(InvalidRequest, match=r"^DDPMPipeline has no encode_prompt, .* ask for return = cache\.$"):
        Embeddings(DDPMPipeline.__new__(DDPMPipeline))
