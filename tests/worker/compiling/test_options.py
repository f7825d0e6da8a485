"""Options of compilation hold, or are refused at the start, in a sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from safelight.protocol.config import Config
from safelight.protocol.errors import StartFailed
from safelight.tests.effort import chosen
from safelight.worker.caching.caching import Caching
from safelight.worker.compiling.compiler import Compiler, use_cache_directory
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.graphs.setting import why_without_graphs
from safelight.worker.model.model import Model
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.rank import compilation
from safelight.worker.rank.compilation import check_compile, new_compiler, warm_up_compiled
from safelight.worker.requests.warm_up import read_sizes, run_size


def test_off_makes_no_compiler(tiny_model: Callable[[str], Model]) -> None:
    assert new_compiler(tiny_model("flux"), Config(), Mesh()) is None
    with pytest.raises(StartFailed, match="--compile-text-encoders needs --compile on"):
        check_compile(Config(compile_text_encoders=True))


def test_a_denoiser_without_blocks_is_refused_and_a_text_encoder_says_why_it_stays_eager(
    tiny_model: Callable[[str], Model],
) -> None:
    model = tiny_model("flux")
    options = Config(compile="on", compile_text_encoders=True)
    model.pipeline.text_encoder.encoder.layers = nn.ModuleList()
    compiler = new_compiler(model, options, Mesh())
    assert compiler is not None
    assert compiler.stats()["text_encoder"].state == "eager"
    assert "CLIPTextModel has no repeated blocks" in str(compiler.stats()["text_encoder"].reason)
    model.pipeline.transformer.transformer_blocks = nn.ModuleList()
    model.pipeline.transformer.single_transformer_blocks = nn.ModuleList()
    sentence = "--compile on is impossible for transformer: FluxTransformer2DModel has no repeated blocks.*module lists"
    with pytest.raises(StartFailed, match=sentence):
        new_compiler(model, options, Mesh())


def test_listed_sizes_are_compiled_with_text_encoders_before_the_replica_is_ready(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "Compiler", partial(Compiler, backend="eager"))
    model = tiny_model("zimage")
    config = Config(compile="on", compile_text_encoders=True, compile_sizes="64x64,64x64x3")
    compiler = new_compiler(model, config, Mesh())
    assert compiler is not None
    batcher = Batcher(
        max_batch=4,
        max_tokens=10**6,
        resources=ForwardResources(cache=PromptCache(2**20, compiled=True), compiled=compiler),
    )
    reported: list[str] = []
    warm_up_compiled(config, model, batcher, Caching(config, {}, float), reported.append)
    assert reported == ["compiling for 64x64x1", "compiling for 64x64x3"]
    before = compiler.stats()
    assert {name: stats.state for name, stats in before.items()} == {
        "transformer": "compiled",
        "text_encoder": "compiled",
    }
    batcher.forget_answers()
    for size in read_sizes("", config.compile_sizes):
        run_size(model, batcher, None, "", size)
    after = compiler.stats()
    assert all(after[name].eager_calls == stats.eager_calls < after[name].calls for name, stats in before.items())


@pytest.mark.parametrize("family", chosen("zimage", nightly=["qwenimage"]))
def test_a_prompt_of_a_length_that_no_request_had_needs_no_graph_after_the_warm_up(
    family: str, tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen-Image's texts keep their lengths; Z-Image's are padded to a multiple of 32."""
    monkeypatch.setattr(compilation, "Compiler", partial(Compiler, backend="eager"))
    model, config = tiny_model(family), Config(compile="on", compile_sizes="64x64,96x64x2")
    compiler = new_compiler(model, config, Mesh())
    assert compiler is not None
    batcher = Batcher(max_batch=4, max_tokens=10**6, resources=ForwardResources(compiled=compiler))
    warm_up_compiled(config, model, batcher, Caching(config, {}, float), lambda _: None)
    before = compiler.stats()["transformer"]
    sizes = read_sizes("", config.compile_sizes)
    for words in (12, 70):
        for size in sizes * 2:
            eager = compiler.stats()["transformer"].eager_calls
            run_size(model, batcher, None, "", size, "circle " * words)
            compiler.wait()
        assert compiler.stats()["transformer"].eager_calls == eager
    after = compiler.stats()["transformer"]
    assert after.kinds > before.kinds, "lengths that are new"
    assert after.graphs == before.graphs


def test_graphs_of_cuda_give_way_to_compilation_and_both_by_force_are_refused() -> None:
    device = torch.device("cuda")
    assert why_without_graphs(Config(), device) is None
    assert "--compile is on" in str(why_without_graphs(Config(compile="on"), device))
    with pytest.raises(StartFailed, match="--piecewise-cuda-graph on is impossible: --compile is on"):
        why_without_graphs(Config(compile="on", piecewise_cuda_graph="on"), device)


def test_graphs_are_kept_where_the_documentation_says_though_torch_has_named_its_own_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    inductors = cache_dir()  # writes torch's own into the environment
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == inductors
    use_cache_directory()
    assert cache_dir() == str(tmp_path / "safelight" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
    use_cache_directory()
    assert cache_dir() == str(tmp_path / "chosen")
