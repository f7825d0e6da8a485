"""Writes of a pipeline to its components during a call stay in that call, whatever it writes and however it ends.

The truth is the plain pipeline: for who writes, on a copy of its own; for everybody else, untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import BaseOutput
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import PushToHubMixin

from safelight.tests.effort import NIGHTLY
from safelight.worker.crossing.call import Call, cross
from safelight.worker.crossing.coroutine import Cancelled, Coroutine
from safelight.worker.crossing.fork import Fork
from safelight.worker.forward.batcher import Batcher
from safelight.worker.forward.prompt_cache import PromptCache
from safelight.worker.forward.resources import ForwardResources


class Knobs(nn.Module):
    """A component of a pipeline's own, with state of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.table = {"a": 1.0}
        self.steps = [1.0]
        self.marks = {1.0}
        self.optional: float | None = 2.0
        self.seen: torch.Tensor | None = None
        self.linear = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.named = nn.ModuleDict({"one": nn.Linear(4, 4)})
        self.register_buffer("mean", torch.full((4,), 0.5))

    @property
    def gain(self) -> float:
        return self.scale

    @gain.setter
    def gain(self, value: float) -> None:
        self.layers[0].gain = value  # type: ignore[assignment]

    def double(self) -> None:  # type: ignore[override]  # without tensors, so that it runs at once
        self.layers[1].scale = 2.0  # type: ignore[assignment]

    def count(self) -> None:
        self.mean.add_(1)

    def remember(self, x: torch.Tensor) -> None:
        self.seen = x.mean()

    @contextmanager
    def scaled(self, by: float) -> Iterator[None]:
        before, self.scale = self.scale, by
        yield
        self.scale = before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x.to(self.linear.weight.dtype)).float()
        for layer in (*self.layers, *self.named.values()):
            x = layer(x.to(layer.weight.dtype)).float() * vars(layer).get("gain", 1.0) * vars(layer).get("scale", 1.0)
        x = x * self.scale + self.table["a"] + sum(self.steps) + sum(self.marks) + self.mean.float().mean()
        x = x + (self.optional if "optional" in vars(self) and self.optional is not None else 0.0)
        return x if self.seen is None else x + self.seen


Write = Callable[[DiffusionPipeline], Any]


class Writer(DiffusionPipeline):
    """Writes to its components in the middle of a call, makes more calls, and mostly never puts anything back."""

    def __init__(
        self, unet: UNet2DConditionModel, knobs: Knobs, text_encoder: CLIPTextModel, scheduler: DDIMScheduler
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, knobs=knobs, text_encoder=text_encoder, scheduler=scheduler)
        self.notes: list[float] = []

    def __call__(self, value: float, write: Write | None = None) -> BaseOutput:
        x = torch.full((1, 3, 8, 8), value)
        ids = torch.tensor([[1, 2, 3]])
        found: list[torch.Tensor] = []
        later: Any = None
        for step in (1, 2, 3):
            text = self.text_encoder(ids).last_hidden_state
            found += [self.unet(x, step, text).sample, self.knobs(x[0, 0, :4, :4]), text]
            if step == 1:
                later = write(self) if write is not None else None
            elif callable(later) and not isinstance(later, nn.Module):
                later = later()
        self.notes.append(value)
        found.append(torch.tensor(self.notes))
        return BaseOutput(images=torch.cat([part.detach().float().flatten() for part in found])[None])


@pytest.fixture(scope="module")
def pipeline() -> Writer:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    config = CLIPTextConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    return Writer(unet.eval(), Knobs().eval(), CLIPTextModel(config).eval(), DDIMScheduler())


class Louder(AttnProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 3


class Tripled(ModelHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 3


def _louder_processors(pipe: DiffusionPipeline) -> None:
    for name, module in pipe.unet.named_modules():
        if isinstance(module, diffusers.models.attention_processor.Attention) and name:
            module.processor = Louder()


def _softer_processors(pipe: DiffusionPipeline) -> None:
    for processor in pipe.unet.attn_processors.values():
        processor.loudness = 0.5


def _each(component: nn.Module, attribute: str, value: Any) -> None:
    for parameter in component.parameters():
        setattr(parameter, attribute, value.expand(parameter.shape) if isinstance(value, torch.Tensor) else value)


def _hook(pipe: DiffusionPipeline) -> Callable[[], None]:
    handle = pipe.knobs.layers[0].register_forward_hook(lambda module, given, made: made * 2)
    return handle.remove


def _context(pipe: DiffusionPipeline) -> Callable[[], None]:
    context = pipe.knobs.scaled(5.0)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def _later_through_a_config(pipe: DiffusionPipeline) -> Callable[[], None]:
    config = pipe.unet.config
    return lambda: vars(config).update(extra=3)


def _kept_module(pipe: DiffusionPipeline) -> Callable[[], None]:
    layer = pipe.knobs.layers[0]
    return lambda: setattr(layer, "gain", 4.0)


def _later_data(pipe: DiffusionPipeline) -> Callable[[], None]:
    weight = pipe.knobs.linear.weight
    return lambda: setattr(weight, "data", torch.ones(4, 4))


def _swap_layer(pipe: DiffusionPipeline) -> None:
    pipe.knobs.layers[0] = nn.Linear(4, 4).requires_grad_(False)
    nn.init.ones_(pipe.knobs.layers[0].weight)
    nn.init.ones_(pipe.knobs.layers[0].bias)


def _exchange_layers(pipe: DiffusionPipeline) -> None:
    pipe.knobs.linear = pipe.knobs.layers[1]


WRITES: dict[str, Write] = {
    "an attribute": lambda pipe: setattr(pipe.knobs, "scale", 7.0),
    "an attribute that is deleted": lambda pipe: delattr(pipe.knobs, "optional"),
    "a table": lambda pipe: pipe.knobs.table.update(a=9.0),
    "a list": lambda pipe: pipe.knobs.steps.append(9.0),
    "a set": lambda pipe: pipe.knobs.marks.add(9.0),
    "a property": lambda pipe: setattr(pipe.knobs, "gain", 9.0),
    "a method": lambda pipe: pipe.knobs.double(),
    "a method with tensors": lambda pipe: pipe.knobs.remember(torch.full((1,), 9.0)),
    "a context that stays open over calls": _context,
    "the module's own attributes": lambda pipe: vars(pipe.knobs).update(scale=7.0),
    "a layer in a list": lambda pipe: setattr(pipe.knobs.layers[0], "gain", 2.0),
    "a layer that is kept for later": _kept_module,
    "another layer": _swap_layer,
    "a layer in another's place": _exchange_layers,
    "a buffer": lambda pipe: setattr(pipe.knobs, "mean", torch.full((4,), 9.0)),
    "a buffer's values": lambda pipe: pipe.knobs.mean.mul_(3),
    "a buffer's values, by a method": lambda pipe: pipe.knobs.count(),
    "a layer in a table": lambda pipe: setattr(next(iter(pipe.knobs.named.values())), "gain", 3.0),
    "a layer through the module's own table": lambda pipe: setattr(pipe.knobs._modules["linear"], "forward", torch.sin),
    "a parameter": lambda pipe: setattr(pipe.knobs.linear, "weight", nn.Parameter(torch.ones(4, 4))),
    "a parameter's data": lambda pipe: setattr(pipe.knobs.linear.weight, "data", torch.ones(4, 4)),
    "a parameter's data, later": _later_data,
    "gradients": lambda pipe: pipe.unet.requires_grad_(False),
    "a dtype": lambda pipe: pipe.knobs.to(torch.bfloat16),
    "a dtype by name": lambda pipe: pipe.knobs.bfloat16(),
    "a layer's dtype": lambda pipe: pipe.knobs.layers[1].to(torch.bfloat16),
    "a dtype and back": lambda pipe: pipe.knobs.to(torch.bfloat16).to(torch.float32),
    "a dtype and later back": lambda pipe: (pipe.knobs.to(torch.bfloat16), pipe.knobs.float)[1],
    "training": lambda pipe: pipe.unet.train(),
    "attention processors": lambda pipe: pipe.unet.set_attn_processor(Louder()),
    "attention processors, one by one": _louder_processors,
    "an attention processor's attribute": _softer_processors,
    "every parameter's data": lambda pipe: _each(pipe.knobs, "data", torch.zeros(1)),
    "every parameter's gradients": lambda pipe: _each(pipe.unet, "requires_grad", False),
    "attention slices": lambda pipe: pipe.unet.set_attention_slice("max"),
    "free u": lambda pipe: pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "fused projections": lambda pipe: pipe.unet.fuse_qkv_projections(),
    "a diffusers configuration": lambda pipe: pipe.unet.register_to_config(center_input_sample=True),
    "a diffusers configuration's attribute": lambda pipe: setattr(pipe.unet.config, "center_input_sample", True),
    "a configuration through a reference": _later_through_a_config,
    "a transformers configuration": lambda pipe: setattr(pipe.text_encoder.config, "eos_token_id", 3),
    "a hook": lambda pipe: pipe.knobs.register_forward_hook(lambda module, given, made: made * 2),
    "a hook that is removed later": _hook,
    "a hook of diffusers": lambda pipe: HookRegistry.check_if_exists_or_initialize(pipe.knobs).register_hook(
        Tripled(), "tripled"
    ),
    "the pipeline's own list": lambda pipe: pipe.notes.append(9.0),
}


def state(pipeline: Writer) -> list[Any]:
    """Everything that a later request could see of the components."""
    found: list[Any] = []
    for component in (pipeline.unet, pipeline.knobs, pipeline.text_encoder):
        for name, module in component.named_modules():
            plain = {key: value for key, value in vars(module).items() if not isinstance(value, dict | nn.Module)}
            tables = {key: dict(value) for key, value in vars(module).items() if isinstance(value, dict)}
            attributes = {key: repr(value) for key, value in plain.items()}
            found.append((name, list(vars(module)), attributes, {key: list(value) for key, value in tables.items()}))
        found += [(name, one.dtype, one.requires_grad, one.tolist()) for name, one in component.state_dict().items()]
        found.append([one.requires_grad for one in component.parameters()])
        found.append(repr(vars(component.config)) if hasattr(component, "config") else None)
    found.append([dict(vars(processor)) for processor in pipeline.unet.attn_processors.values()])
    return found


def plain(pipeline: Writer, value: float, write: Write | None = None) -> torch.Tensor:
    return copy.deepcopy(pipeline)(value, write).images


def coroutine(pipeline: Writer, value: float, write: Write | None = None, *, watches_all: bool = False) -> Coroutine:
    def body() -> torch.Tensor:
        with Fork(pipeline, watches_all=watches_all) as forked:
            return forked(value, write).images

    return Coroutine(body, lambda _: None)


def new_batcher(**changes: Any) -> Batcher:
    resources = ForwardResources(cache=PromptCache(10**6))
    return Batcher(**({"max_batch": 4, "max_tokens": 10**6, "mode": "merged", "resources": resources} | changes))


def run(batcher: Batcher, coroutines: list[Coroutine]) -> list[torch.Tensor]:
    for one in coroutines:
        batcher.start(one)
    while batcher.busy:
        batcher.step()
    for one in coroutines:
        if one.error is not None:
            raise one.error
    return [one.result for one in coroutines]


def close(made: torch.Tensor, expected: torch.Tensor) -> bool:
    return made.shape == expected.shape and torch.allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize("name", WRITES)
def test_what_one_request_writes_no_other_sees(name: str, pipeline: Writer) -> None:
    before, write = state(pipeline), WRITES[name]
    batcher = new_batcher()
    writing, other = plain(pipeline, 1.0, write), plain(pipeline, 2.0)
    made = run(batcher, [coroutine(pipeline, *call) for call in ((1.0, write), (2.0, None), (1.0, write), (2.0, None))])
    assert all(close(*pair) for pair in zip(made, [writing, other] * 2, strict=True))
    assert state(pipeline) == before
    assert batcher.runner.counters.forwards < batcher.runner.counters.calls, "those that write nothing still meet"


STRIDE = 1 if NIGHTLY else 23
"""Calls between two that a request is cancelled after."""


CANCELLED = [
    (name, watches_all)
    for number, name in enumerate(WRITES)
    for watches_all in (False, True)
    if NIGHTLY or watches_all == bool(number % 2)
]


@pytest.mark.parametrize(("name", "watches_all"), CANCELLED)
def test_a_request_that_is_cancelled_after_any_call_leaves_nothing(
    name: str, watches_all: bool, pipeline: Writer
) -> None:
    before, write, other = state(pipeline), WRITES[name], plain(pipeline, 2.0)
    turns = list(WRITES).index(name) % STRIDE  # so that in every run each call is somebody's last
    while True:
        batcher = new_batcher(mode="serial")
        doomed = coroutine(pipeline, 1.0, write, watches_all=watches_all)
        batcher.start(doomed)
        for _ in range(turns):
            batcher.step()
        if doomed.finished:
            break
        batcher.cancel(doomed)
        assert isinstance(doomed.error, Cancelled)
        turns += STRIDE
    assert state(pipeline) == before
    assert torch.equal(doomed.result, plain(pipeline, 1.0, write))
    assert torch.equal(run(batcher, [coroutine(pipeline, 2.0, watches_all=watches_all)])[0], other)


def test_an_update_between_a_cast_and_the_way_back_is_in_the_cast_and_stays(pipeline: Writer) -> None:
    model, fresh = copy.deepcopy(pipeline), copy.deepcopy(pipeline)
    for watches_all in (False, True):
        batcher = new_batcher(mode="serial" if watches_all else "interleaved")
        casting = coroutine(model, 1.0, WRITES["a dtype and later back"], watches_all=watches_all)
        batcher.start(casting)
        for _ in range(5):
            batcher.step()
        with batcher.aside():
            assert {one.dtype for one in model.knobs.parameters()} == {torch.float32}
            for one, same in zip(model.knobs.parameters(), fresh.knobs.parameters(), strict=True):
                one.copy_(one * 2)
                same.copy_(one)
        while batcher.busy:
            batcher.step()
        assert casting.error is None
        assert all(map(torch.equal, model.knobs.parameters(), fresh.knobs.parameters()))
        assert torch.equal(run(batcher, [coroutine(model, 2.0)])[0], plain(fresh, 2.0))


def test_a_call_in_a_request_s_own_state_is_not_answered_from_the_cache(pipeline: Writer) -> None:
    """A hook that listens to an encoder hears of its forward, though the prompt is known."""
    heard: list[Any] = []

    def listen(pipe: DiffusionPipeline) -> None:
        pipe.text_encoder.encoder.layers[0].register_forward_hook(lambda *_: heard.append(1))

    run(new_batcher(), [coroutine(pipeline, 1.0), coroutine(pipeline, 1.0, listen)])
    assert len(heard) == 2


def test_a_hook_of_a_fork_s_within_its_own_forward_can_use_the_component(pipeline: Writer) -> None:
    def write(pipe: DiffusionPipeline) -> None:
        layer = pipe.knobs.layers[0]
        pipe.knobs.register_forward_hook(lambda module, given, made: made + layer(given[0]))

    assert torch.equal(run(new_batcher(), [coroutine(pipeline, 1.0, write)])[0], plain(pipeline, 1.0, write))


def test_no_memory_for_the_request_s_cast_fails_the_request_and_leaves_nothing(
    pipeline: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(pipeline)

    def write(pipe: DiffusionPipeline) -> None:
        pipe.knobs.to(torch.bfloat16)
        monkeypatch.setattr(torch.Tensor, "to", refuse)

    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    batcher, doomed = new_batcher(), coroutine(pipeline, 1.0, write)
    batcher.start(doomed)
    while batcher.busy:
        batcher.step()
    monkeypatch.undo()
    assert isinstance(doomed.error, torch.OutOfMemoryError)
    assert state(pipeline) == before


def test_a_plain_call_through_a_raw_boundary_needs_no_fork() -> None:
    assert cross(Call("knobs", "__call__", torch.neg, (torch.ones(1),), {})) == -1


class Settings(PushToHubMixin):
    """A tokenizer, or a processor that holds one."""

    def __init__(self, tokenizer: Settings | None = None) -> None:
        self.padding_side = "right"
        self.tokenizer = tokenizer


def test_what_is_written_to_processors_is_the_request_s_own_by_each_of_their_names(pipeline: Writer) -> None:
    """Including processors that are not components, as diffusers' own, and those inside others."""
    shared = copy.copy(pipeline)
    shared.image_processor, tokenizer = VaeImageProcessor(), Settings()
    shared.processor, shared.tokenizer = Settings(tokenizer), tokenizer
    with Fork(shared) as forked:
        forked.image_processor.register_to_config(do_normalize=False)
        forked.processor.tokenizer.padding_side = "left"
        assert forked.tokenizer.padding_side == "left"
    assert shared.image_processor.config.do_normalize
    assert tokenizer.padding_side == "right"


def test_a_fork_writes_into_its_schedulers_tensors_alone(pipeline: Writer) -> None:
    """A tensor under two names is one tensor in the fork, too."""
    shared = pipeline.scheduler
    vars(shared)["again"] = shared.timesteps
    before = shared.timesteps.clone()
    with Fork(pipeline) as fork:
        fork.scheduler.timesteps.zero_()
        assert not fork.scheduler.again.any()
    assert torch.equal(shared.timesteps, before)
    del vars(shared)["again"]
