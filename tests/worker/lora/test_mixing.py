"""Requests with different adapters, or none, drawn together, are what each is alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from safelight.protocol.adapters import SetAdapters, Use
from safelight.protocol.generation import Generate
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.model.model import Model

from .agreement import Made, change, distance, draw, new_adapters, new_batcher, request, source, write_adapter

LINEAR = (Made("first", 3, 3.0, seed=1), Made("second", 20, 10.0, ("to_", "attn", "attention"), seed=2))
WITH_CONVOLUTIONS = (Made("first", 3, 3.0, seed=1, kinds=(nn.Linear, nn.Conv2d)), LINEAR[1])
CHOICES: list[list[Use] | None] = [[Use("first")], [], [Use("second", 0.5)], [Use("first", -1.0), Use("second")], None]


def prepared(model: Model, made: tuple[Made, ...], folder: Path, component: str = "transformer") -> SetAdapters:
    module = model.pipeline.components[component]
    folders = [write_adapter(one, module, folder) for one in made]
    nicknames = [one.nickname for one in made]
    return SetAdapters(
        nicknames=nicknames, strengths=[1.0] * len(made), mode="request", sources=[source(one) for one in folders]
    )


@pytest.mark.parametrize(
    ("name", "made", "component", "meet"),
    [
        ("flux", LINEAR, "transformer", True),
        ("wan", LINEAR, "transformer", True),
        ("qwenimage", LINEAR, "transformer", True),
        ("zimage", LINEAR, "transformer", False),
        ("flux2", LINEAR, "transformer", True),
        ("hunyuan_video", LINEAR, "transformer", True),
        ("sdxl", LINEAR, "unet", True),
        ("sdxl", WITH_CONVOLUTIONS, "unet", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_together_is_as_alone(
    name: str,
    made: tuple[Made, ...],
    component: str,
    meet: bool,
    tiny_model: Callable[[str], Model],
    tmp_path: Path,
) -> None:
    model = tiny_model(name)
    adapters = new_adapters(model)
    change(adapters, prepared(model, made, tmp_path, component))
    requests = [replace(request(name, 0, uses), request_id=str(index)) for index, uses in enumerate(CHOICES)]
    alone = [draw(model, new_batcher(adapters), adapters, [asked])[0] for asked in requests]
    batcher = new_batcher(adapters)
    together = draw(model, batcher, adapters, requests)
    assert max(distance(one, other) for one, other in zip(together, alone, strict=True)) < 1e-5
    assert min(distance(one, alone[1]) for index, one in enumerate(alone) if index not in (1, 4)) > 1e-3
    assert batcher.policy.takes_turns(component) != meet
    assert batcher.runner.counters.forwards < batcher.runner.counters.calls


def test_a_text_encoder_s_answers_are_kept_for_each_choice_of_adapters(
    tiny_model: Callable[[str], Model], tmp_path: Path
) -> None:
    model = tiny_model("flux")
    adapters = new_adapters(model)
    folder = write_adapter(Made("words", 4, 4.0, seed=1), model.pipeline.text_encoder_2, tmp_path)
    file = folder / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = {name.replace("base_model.model.", "text_encoder_2."): one for name, one in load_file(file).items()}
    save_file(tensors, file)
    change(adapters, SetAdapters(nicknames=["words"], strengths=[1.0], mode="request", sources=[source(folder)]))
    batcher = new_batcher(adapters, PromptCache(1 << 24))

    def asked(lora: list[Use] | None) -> Generate:
        return request("flux", 0, lora)

    plain, with_words = draw(model, batcher, adapters, [asked(None), asked([Use("words")])])
    assert distance(plain, with_words) > 1e-4
    encoded = list[None]()
    model.pipeline.text_encoder_2.register_forward_pre_hook(lambda *_: encoded.append(None))
    for lora, expected in ((None, plain), ([Use("words")], with_words)):
        assert distance(draw(model, batcher, adapters, [asked(lora)])[0], expected) < 1e-6
    assert not encoded, "answered from the cache"
    assert distance(draw(model, batcher, adapters, [asked([Use("words", 0.0)])])[0], plain) < 1e-6
    stronger = draw(model, batcher, adapters, [asked([Use("words", 3.0)])])[0]
    assert distance(stronger, with_words) > 1e-4
    assert len(encoded) == 2


def test_a_layer_whose_rows_are_not_those_of_requests_is_not_mixed() -> None:
    from safelight.worker.forward.adapters import CannotMix
    from safelight.worker.lora.adapter import Adapter
    from safelight.worker.lora.dynamic import DynamicLora
    from safelight.worker.lora.factors import LoraFactors

    layer = nn.Linear(6, 5)
    down, up = torch.randn(2, 6), torch.randn(5, 2)
    adapter = Adapter("a", {"transformer": {"0": LoraFactors("0.weight", down, 0.5 * up, 0.5 * up)}})
    dynamic = DynamicLora("transformer", nn.Sequential(layer))
    dynamic.retain([adapter])
    rows = [(1, ((adapter, 1.0),)), (2, ())]
    for shape in ((3, 6), (3, 4, 6), (6, 4, 6)):
        x = torch.randn(shape)
        plain = layer(x)
        with dynamic.applied(rows):
            mixed = layer(x)
        own = shape[0] // 3
        torch.testing.assert_close(mixed[:own], plain[:own] + 0.5 * (x[:own] @ down.T) @ up.T)
        assert torch.equal(mixed[own:], plain[own:])
    for shape, listed in (((4, 6), False), ((6, 6), True)):
        with pytest.raises(CannotMix), dynamic.applied(rows, listed=listed):
            layer(torch.randn(shape))
    assert torch.equal(layer(x), plain), "outside of it nothing is added"
