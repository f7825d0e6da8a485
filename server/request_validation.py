"""Check a generation request against limits that hold for every model, and make its message."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

import msgspec

from ..protocol.adapters import Use
from ..protocol.config import MOST_PIXELS, Config
from ..protocol.errors import InvalidRequest
from ..protocol.fields import TABLE, Field, Table
from ..protocol.generation import Generate, Image, Sample
from ..protocol.output_formats import OutputFormat
from ..protocol.step_caching import CHOICES, PATTERN, asks_for_cache
from .schemas import GenerateBody

_BEYOND = 2**63


@dataclass(frozen=True)
class Range:
    """The values from ``low`` to ``high``, both included."""

    low: float
    high: float

    def check(self, name: str, value: float, field: str | None = None) -> None:
        if not self.low <= value <= self.high:
            low, high = (f"{bound:.0f}" if bound == int(bound) else f"{bound:g}" for bound in (self.low, self.high))
            raise InvalidRequest(f"{name} must be between {low} and {high}, not {value}.", field=field or name)


def check_table(body: GenerateBody, table: Table, config: Config) -> None:
    """Raise ``InvalidRequest`` for a number out of the range that ``table`` has for it."""
    for name, row in table.items():
        value = getattr(body, name)
        if row.field.low is not None and isinstance(value, int | float):
            _range(row.field, config).check(name, value)


def _range(field: Field, config: Config) -> Range:
    assert field.low is not None
    match field.high:
        case "max_pixels":
            return Range(field.low, config.max_pixels or MOST_PIXELS)
        case str() as option:
            return Range(field.low, getattr(config, option))
        case high:
            assert high is not None
            return Range(field.low, high)


def check_ranges(body: GenerateBody, config: Config) -> None:
    """Raise ``InvalidRequest`` for values outside these limits."""
    names = [use.name for use in body.lora or ()]
    if len(set(names)) < len(names):
        raise InvalidRequest("An adapter is named twice; give each once, with its scale.", field="lora")
    check_table(body, TABLE, config)
    for name, number in (("n", body.n), ("num_outputs_per_prompt", body.num_outputs_per_prompt)):
        if number is not None:
            Range(1, config.max_outputs).check(name, number)
    if body.num_outputs_per_prompt is not None and "n" in body.model_fields_set and body.n != outputs_per_prompt(body):
        raise InvalidRequest("n and num_outputs_per_prompt are the same field, but have different values.", field="n")
    total = len(body.prompt) * outputs_per_prompt(body)
    if total > config.max_outputs:
        raise InvalidRequest(
            f"A request may have between 1 and {config.max_outputs} outputs; {len(body.prompt)} prompts "
            f"with n = {outputs_per_prompt(body)} make {total}.",
            field="prompt" if len(body.prompt) > config.max_outputs else "n",
        )
    _check_texts(body, config)
    _check_seeds(body)
    _check_cache(body)
    if body.settings.preview_every and not body.stream:
        raise InvalidRequest("preview_every needs stream = true.", field="preview_every")


def to_message(
    body: GenerateBody, images: list[Image], request_id: str, output_format: OutputFormat, config: Config
) -> Generate:
    """The scheduler's message for a checked ``body``, with a seed for every output."""
    per_prompt = outputs_per_prompt(body)
    settings = msgspec.structs.asdict(body.settings)
    if settings["timeout_s"] is None:
        settings["timeout_s"] = config.request_timeout_s
    return Generate(
        request_id=request_id,
        samples=[
            Sample(prompt, seed)
            for prompt, seed in zip(
                (prompt for prompt in body.prompt for _ in range(per_prompt)), _seeds(body), strict=True
            )
        ],
        images=images,
        output_format=output_format,
        progress=body.stream,
        lora=None if body.lora is None else [Use(use.name, use.scale) for use in body.lora],
        **settings,
    )


def outputs_per_prompt(body: GenerateBody) -> int:
    return body.n if body.num_outputs_per_prompt is None else body.num_outputs_per_prompt


def _seeds(body: GenerateBody) -> list[int]:
    """One seed for each output, prompt by prompt."""
    prompts, n = len(body.prompt), outputs_per_prompt(body)
    first = body.seed
    if first is None:
        first = [secrets.randbelow(2**32 - n) for _ in range(prompts)]
    elif len(first) == 1:
        first = first * prompts
    if len(first) == prompts:
        return [seed + i for seed in first for i in range(n)]
    return first


def _check_seeds(body: GenerateBody) -> None:
    if body.seed is None:
        return
    prompts, n = len(body.prompt), outputs_per_prompt(body)
    lengths = sorted({1, prompts, prompts * n})
    if len(body.seed) not in lengths:
        raise InvalidRequest(
            f"seed must be one integer or a list of {' or '.join(map(str, lengths))} "
            f"for {prompts} prompts with n = {n}, not of {len(body.seed)}.",
            field="seed",
        )
    for seed in (min(body.seed), max(_seeds(body))):
        if not 0 <= seed < _BEYOND:
            raise InvalidRequest(
                f"seed must be between 0 and {_BEYOND - 1}, counted up to the last output; {seed} is not.", field="seed"
            )


def _check_cache(body: GenerateBody) -> None:
    cache = body.settings.cache
    if isinstance(cache, str) and not re.match(PATTERN, cache):
        raise InvalidRequest(f"cache must be {CHOICES}, not {cache[:100]!r}.", field="cache")
    if asks_for_cache(cache) and body.settings.deterministic:
        raise InvalidRequest("A deterministic request computes every forward; leave out cache.", field="cache")


def _check_texts(body: GenerateBody, config: Config) -> None:
    texts = [("prompt", prompt) for prompt in body.prompt]
    settings = msgspec.structs.asdict(body.settings)
    texts += [(name, value) for name, value in settings.items() if isinstance(value, str)]
    texts += [(f"extra.{name}", value) for name, value in body.settings.extra.items() if isinstance(value, str)]
    for field, text in texts:
        if len(text) > config.max_prompt_chars:
            raise InvalidRequest(
                f"{field} must have between 0 and {config.max_prompt_chars} characters, not {len(text)}.", field=field
            )
