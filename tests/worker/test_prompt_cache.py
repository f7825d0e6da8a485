"""The prompt cache: what it may answer, and what it may not."""

from __future__ import annotations

from typing import Any

import torch

from safelight.worker.crossing.call import Call
from safelight.worker.forward.prompt_cache import PromptCache, prompt_key


def call(ids: list[int], component: str = "text_encoder", **kwargs: Any) -> Call:
    return Call(component, "__call__", lambda *_, **__: None, (torch.tensor([ids]),), kwargs)


def test_only_the_same_content_and_flags_are_the_same_prompt() -> None:
    key = prompt_key(call([1, 2]))
    assert key is not None
    assert key == prompt_key(call([1, 2]))
    others = [call([1, 3]), call([1, 2, 0]), call([1, 2], output_hidden_states=True), call([1, 2], "text_encoder_2")]
    assert all(prompt_key(other) != key for other in others)


def test_only_text_encoders_are_kept() -> None:
    assert prompt_key(call([1], "transformer")) is None
    assert prompt_key(call([1], generator=torch.Generator())) is None


def test_a_pipeline_may_write_to_what_it_was_given() -> None:
    cache = PromptCache(2**20)
    value = torch.ones(4)
    cache.put("key", (value, None), exact=True)
    value.zero_()
    first = cache.get("key", exact=True)
    first[0].fill_(7)
    assert cache.get("key", exact=True)[0].tolist() == [1.0] * 4


def test_a_deterministic_request_gets_no_cached_values_from_a_merged_forward() -> None:
    cache = PromptCache(2**20)
    cache.put("key", torch.ones(4), exact=False)
    assert cache.get("key", exact=True) is None
    assert cache.get("key", exact=False) is not None
    cache.put("key", torch.zeros(4), exact=True)
    cache.put("key", torch.ones(4), exact=False)
    assert cache.get("key", exact=False).tolist() == [0.0] * 4


def test_the_least_recently_used_goes_when_the_capacity_is_reached() -> None:
    cache = PromptCache(3 * 16)
    for name in "abc":
        cache.put(name, torch.ones(4), exact=True)
    cache.get("a", exact=True)
    cache.put("d", torch.ones(4), exact=True)
    assert [cache.get(name, exact=True) is not None for name in "abcd"] == [True, False, True, True]
    cache.put("large", torch.ones(100), exact=True)
    assert cache.get("large", exact=True) is None
    assert cache.get("a", exact=True) is not None
    cache.clear()
    assert cache.get("a", exact=True) is None
