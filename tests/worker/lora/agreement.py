"""Adapters in every way that they can be applied, beside peft's own; in a module that ranks' processes can import."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from msgspec.structs import replace
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from safelight.protocol.adapters import ALL, AdapterChange, AdapterSource, SetAdapters, UnmergeAdapters, Use
from safelight.protocol.config import Config
from safelight.protocol.generation import Generate, Sample
from safelight.tests.tiny import FAMILIES, save
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources
from safelight.worker.forward.runner import Division
from safelight.worker.lora.rank_adapters import RankAdapters
from safelight.worker.model.model import Model, load_model
from safelight.worker.parallel.ranks import ALONE, Ranks
from safelight.worker.requests.outputs import first_output
from safelight.worker.requests.sample import SampleRun
from safelight.worker.weights.snapshot.digests import module_digests

FAMILIES_OF_THE_PROOF = ("flux", "sd3", "qwenimage", "zimage", "wan")
CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue squares", "a star", "one heart"]


@dataclass(frozen=True)
class Made:
    """An adapter that was made up: of this rank and alpha, for the layers whose names contain one of ``layers``."""

    nickname: str
    rank: int
    alpha: float
    layers: tuple[str, ...] = ("",)
    seed: int = 0
    kinds: tuple[type[nn.Linear] | type[nn.Conv2d], ...] = (nn.Linear,)


ADAPTERS = (
    Made("small", 1, 0.5, seed=1),
    Made("middle", 8, 16.0, ("attn", "attention", "to_q", "to_k", "ff", "feed"), seed=2),
    Made("large", 64, 24.0, ("to_v", "to_q", "attn"), seed=3),
)


def layers_of(transformer: nn.Module, made: Made) -> dict[str, nn.Linear | nn.Conv2d]:
    found = {
        path: layer
        for path, layer in transformer.named_modules()
        if isinstance(layer, made.kinds) and any(part in path for part in made.layers)
    }
    assert found
    return found


def write_adapter(made: Made, transformer: nn.Module, folder: Path, strength: float = 0.2) -> Path:
    """A directory as peft writes one. The adapter changes pictures visibly, whatever its rank and alpha."""
    torch.manual_seed(made.seed)
    tensors = {}
    for path, layer in layers_of(transformer, made).items():
        out, *shape = layer.weight.shape
        inputs = prod(shape)
        size = strength * float(layer.weight.detach().std()) * inputs**0.5
        down = torch.randn(made.rank, *shape) / inputs**0.5
        up = torch.randn(out, made.rank) * size / made.rank**0.5 * (made.rank / made.alpha)
        tensors[f"base_model.model.{path}.lora_A.weight"] = down
        tensors[f"base_model.model.{path}.lora_B.weight"] = up.view(*up.shape, *[1] * (len(shape) - 1))
    target = folder / made.nickname
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": made.rank, "lora_alpha": made.alpha, "target_modules": []}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def source(folder: Path, nickname: str | None = None, alpha: float | None = None) -> AdapterSource:
    """As the server makes one; the digest is of the name alone."""
    return AdapterSource(nickname or folder.name, str(folder), str(folder), f"{folder} {alpha}", alpha)


def request(name: str, index: int, lora: list[Use] | None = None) -> Generate:
    fields = set(Generate.__struct_fields__)
    call = dict(FAMILIES[name].call)
    return Generate(
        request_id=str(index),
        samples=[Sample(PROMPTS[index % len(PROMPTS)], seed=100 + index)],
        extra={key: value for key, value in call.items() if key not in fields},
        lora=lora,
        **{key: value for key, value in call.items() if key in fields},
    )


def new_adapters(model: Model, ranks: Ranks = ALONE, most: int = 64, most_bytes: int = 1 << 40) -> RankAdapters:
    return RankAdapters(model.pipeline, model.layouts, ranks, model.device, max_adapters=most, max_bytes=most_bytes)


def change(adapters: RankAdapters, wanted: AdapterChange) -> None:
    adapters.prepare(wanted)
    adapters.write()
    adapters.commit()


def new_batcher(
    adapters: RankAdapters | None, cache: PromptCache | None = None, division: Division | None = None
) -> Batcher:
    resources = ForwardResources(adapters=adapters, cache=cache, division=division)
    return Batcher(max_batch=16, max_tokens=10**6, resources=resources)


def draw(model: Model, batcher: Batcher, adapters: RankAdapters, requests: Sequence[Generate]) -> list[torch.Tensor]:
    """The requests' pictures, drawn together."""
    runs = [
        SampleRun(model, asked, 0, lambda *_: None, lambda _: None, adapters.wanted(asked.lora)) for asked in requests
    ]
    for run in runs:
        batcher.start(run.coroutine)
    while batcher.busy:
        batcher.step()
    for run in runs:
        if run.coroutine.error:
            raise run.coroutine.error
    return [run.coroutine.result for run in runs]


def arguments(model: Model, asked: Generate) -> dict[str, object]:
    return SampleRun(model, asked, 0, lambda *_: None, lambda _: None).arguments()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2."""
    return float((one.double() - other.double()).norm() / other.double().norm())


class Peft:
    """The plain pipeline with peft's layers in its transformer."""

    def __init__(
        self, checkpoint: Path, folders: Iterable[tuple[Made, Path]], dtype: torch.dtype = torch.float32
    ) -> None:
        self.pipeline = DiffusionPipeline.from_pretrained(checkpoint, dtype=dtype)
        transformer = self.pipeline.transformer
        self._names: list[str] = []
        for made, folder in folders:
            config = LoraConfig(
                r=made.rank,
                lora_alpha=made.alpha,  # type: ignore[arg-type]  # peft computes with it as it is
                target_modules=list(layers_of_peft(transformer, made)),
                init_lora_weights=False,
            )
            transformer.add_adapter(config, made.nickname)
            self._fill(transformer, made.nickname, load_file(folder / "adapter_model.safetensors"))
            self._names.append(made.nickname)

    def _fill(self, transformer: nn.Module, nickname: str, tensors: dict[str, torch.Tensor]) -> None:
        parameters = dict(transformer.named_parameters())
        for name, tensor in tensors.items():
            own = name.removeprefix("base_model.model.").replace(".weight", f".{nickname}.weight")
            parameters[own].data.copy_(tensor)

    def draw(self, call: dict[str, object], uses: Sequence[tuple[str, float]]) -> torch.Tensor:
        transformer = self.pipeline.transformer
        if uses:
            transformer.enable_adapters()
            transformer.set_adapters([name for name, _ in uses], [scale for _, scale in uses])
        else:
            transformer.disable_adapters()
        return first_output(self.pipeline(**call))


def layers_of_peft(transformer: nn.Module, made: Made) -> list[str]:
    """The same layers, also where another adapter was put into the transformer before."""
    found = [
        path.removesuffix(".base_layer")
        for path, layer in transformer.named_modules()
        if type(layer) is nn.Linear and ".lora_" not in path and any(part in path for part in made.layers)
    ]
    return sorted(set(found))


CHOICES: tuple[tuple[tuple[str, float], ...], ...] = (
    (("middle", 1.0),),
    (("small", 0.7), ("middle", -0.4), ("large", 1.3)),
)


def references(directory: Path) -> None:
    """The outputs of peft, for every family and choice of adapters; written to files."""
    for name in FAMILIES_OF_THE_PROOF:
        checkpoint = save(name, directory)
        model = load_model(Config(model=str(checkpoint), device="cpu"))
        made = [
            (one, write_adapter(one, model.pipeline.transformer, directory / "adapters" / name)) for one in ADAPTERS
        ]
        peft = Peft(checkpoint, made)
        calls = [arguments(model, request(name, index)) for index in range(len(CHOICES))]
        plain = [peft.draw(dict(call), ()) for call in calls]
        calls = [arguments(model, request(name, index)) for index in range(len(CHOICES))]
        drawn = [peft.draw(dict(call), uses) for call, uses in zip(calls, CHOICES, strict=True)]
        torch.save((plain, drawn), directory / f"{name}.pt")


def every_way(ranks: Ranks, directory: Path, fused: bool) -> None:
    """Merged, beside, and by request, together with others: each is what peft draws."""
    for name in FAMILIES_OF_THE_PROOF:
        config = Config(model=str(directory / name), device="cpu", tp=ranks.size, fuse_projections=fused)
        model = load_model(config, CPU, ranks)
        adapters = new_adapters(model, ranks)
        batcher = new_batcher(adapters)
        plain, expected = torch.load(directory / f"{name}.pt")
        before = module_digests(model.layouts, ranks, lambda: None)[0][0]
        folders = directory / "adapters" / name
        change(
            adapters,
            SetAdapters(
                nicknames=[made.nickname for made in ADAPTERS],
                strengths=[1.0] * len(ADAPTERS),
                mode="request",
                sources=[source(folders / made.nickname) for made in ADAPTERS],
            ),
        )
        worst = {}
        for index, uses in enumerate(CHOICES):
            asked = request(name, index)
            nicknames, strengths = [nick for nick, _ in uses], [scale for _, scale in uses]
            for mode in ("merge", "dynamic"):
                change(adapters, SetAdapters(nicknames=nicknames, strengths=strengths, mode=mode))
                (drawn,) = draw(model, batcher, adapters, [asked])
                worst[mode, index] = distance(drawn, expected[index])
                assert module_digests(model.layouts, ranks, lambda: None)[0][0] == before
            change(adapters, UnmergeAdapters(ALL))
            change(adapters, SetAdapters(nicknames=[nicknames[0]], strengths=[0.0], mode="dynamic"))
        assert not any(layout.bases for layout in model.layouts.values())
        together = [request(name, index, [Use(*use) for use in uses]) for index, uses in enumerate(CHOICES)]
        together += [replace(request(name, index, []), request_id=f"none {index}") for index in range(len(CHOICES))]
        forwards = batcher.runner.counters.forwards, batcher.runner.counters.calls
        drawn = draw(model, batcher, adapters, together)
        for index in range(len(CHOICES)):
            worst["request", index] = distance(drawn[index], expected[index])
            worst["none", index] = distance(drawn[len(CHOICES) + index], plain[index])
            assert distance(expected[index], plain[index]) > 1e-3, "an adapter that changes nothing proves nothing"
        assert batcher.runner.counters.forwards - forwards[0] < batcher.runner.counters.calls - forwards[1], (
            "they have not met"
        )
        print(name, ranks.size, {key: f"{value:.1e}" for key, value in worst.items()})
        assert max(worst.values()) < 1e-5, (name, worst)


def in_low_precision(directory: Path, name: str) -> None:
    """How far bfloat16 is from fp32: with peft's layers, and in each of our ways."""
    model = load_model(Config(model=str(directory / name), device="cpu", dtype="bfloat16"))
    folders = directory / "adapters" / name
    _, (expected, _) = torch.load(directory / f"{name}.pt")
    asked = request(name, 0)
    ((nickname, strength),) = CHOICES[0]
    made = next(one for one in ADAPTERS if one.nickname == nickname)
    peft = Peft(directory / name, [(made, folders / nickname)], torch.bfloat16)
    theirs = distance(peft.draw(dict(arguments(model, asked)), CHOICES[0]), expected)
    adapters = new_adapters(model)
    batcher = new_batcher(adapters)
    ours = {}
    sources = [source(folders / nickname)]
    for mode in ("request", "dynamic", "merge"):
        change(
            adapters,
            SetAdapters(nicknames=[nickname], strengths=[strength], mode=mode, sources=sources),
        )
        lora = [Use(nickname, strength)] if mode == "request" else None
        ours[mode] = distance(draw(model, batcher, adapters, [replace(asked, lora=lora)])[0], expected)
    others = [replace(asked, request_id="other", lora=[]), replace(asked, lora=[Use(nickname, strength)])]
    change(adapters, SetAdapters(nicknames=[nickname], strengths=[0.0], mode="dynamic"))
    ours["mixed"] = distance(draw(model, batcher, adapters, others)[1], expected)
    print(name, f"peft {theirs:.1e}", {mode: f"{value:.1e}" for mode, value in ours.items()})
    assert theirs > 1e-4, "it is of low precision"
    assert max(ours.values()) < 1.5 * theirs, (theirs, ours)
