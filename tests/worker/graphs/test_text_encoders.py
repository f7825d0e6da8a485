"""The text encoders of FLUX.1, Stable Diffusion 3 and Wan are recorded as a whole, so that graphs may be enforced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from safelight.tests.worker.graphs.recording import TapeRecorder
from safelight.tests.worker.graphs.toy import Run
from safelight.worker.crossing.call import Call
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.graphs.graphs import Graphs

LAYERS = 3
VOCABULARY = 99
_T5 = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "feed_forward_proj": "gated-gelu"}


def clip() -> nn.Module:
    sizes = {"bos_token_id": 0, "eos_token_id": 1, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=VOCABULARY, num_hidden_layers=LAYERS, **sizes))


def t5() -> nn.Module:
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, num_layers=LAYERS, **_T5))


def umt5() -> nn.Module:
    return UMT5EncoderModel(UMT5Config(vocab_size=VOCABULARY, num_layers=LAYERS, **_T5))


@pytest.mark.parametrize(("build", "masked"), [(clip, False), (t5, False), (umt5, True)])
def test_no_layer_of_a_text_encoder_runs_eagerly_while_graphs_are_enforced(
    build: Callable[[], nn.Module], masked: bool
) -> None:
    torch.manual_seed(0)
    encoder = build().eval()
    found = Graphs({"text_encoder": encoder}, TapeRecorder(), None, max_bytes=10**9)
    run = Run()
    run.batcher = Batcher(max_batch=1, max_tokens=10**6, resources=ForwardResources(graphs=found))

    def is_right(seed: int) -> bool:
        ids = torch.randint(VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(seed))
        further = {"attention_mask": (torch.arange(7) < 3 + seed).long()[None]} if masked else {}
        (answer,) = run(Call("text_encoder", "__call__", encoder, (ids,), further))
        return torch.equal(answer[0], encoder(ids, **further)[0])

    with found.recording():
        assert is_right(0)
    found.enforce()
    assert is_right(1)
    assert is_right(2)
    stats = found.stats()
    assert (stats.captures, stats.replays, stats.misses) == (LAYERS, 2 * LAYERS, 0)
    assert stats.eager == []
