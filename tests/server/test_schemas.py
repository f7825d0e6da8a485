"""Bad bodies get the right status, name the field, and say what is allowed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from msgspec.structs import replace

from safelight.protocol.config import Config
from safelight.protocol.errors import InvalidRequest, Malformed
from safelight.protocol.generation import Generate
from safelight.protocol.replicas import Parameter
from safelight.server.model_limits import check_model
from safelight.server.request_validation import check_ranges, to_message
from safelight.server.schemas import GenerateBody, parse_generate

from .played_scheduler import IMAGE_MODEL

CONFIG = Config(max_steps=100, max_outputs=8, max_pixels=128 * 128, max_prompt_chars=50)


def read(body: bytes) -> Generate:
    fields = parse_generate(body)
    check_ranges(fields, CONFIG)
    check_model(fields, len(fields.image or ()), IMAGE_MODEL, CONFIG)
    return to_message(fields, [], "id", "png", CONFIG)


MALFORMED = [
    (b"", None, "JSON"),
    (b"{", None, "JSON"),
    (b"[]", None, "not a list"),
    (b"null", None, "not null"),
    (b'{"prompt": "\xff"}', None, "UTF-8"),
    (b'{"prompt": "\\ud800"}', None, "JSON"),
    (b'{"prompt": "x", "guidance_scale": NaN}', None, "JSON"),
    (b'{"prompt": "x", "guidance_scale": Infinity}', None, "JSON"),
    (b'{"prompt": "x", "guidance_scale": 1e999}', None, "JSON"),
    (b"[" * 100_000, None, "JSON"),
    (b'{"prompt": "x", "extra": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, None, "JSON"),
    (b"{}", "prompt", "required"),
    (b'{"prompt": 5}', "prompt", "a string or a list of them, not a number"),
    (b'{"prompt": null}', "prompt", "not null"),
    (b'{"prompt": ["a", 3]}', "prompt", "prompt[1] must be a string, not a number"),
    (b'{"prompt": {"a": 1}}', "prompt", "not an object"),
    (b'{"prompt": "x", "width": "64"}', "width", "an integer, not a string"),
    (b'{"prompt": "x", "width": 64.0}', "width", "an integer"),
    (b'{"prompt": "x", "width": true}', "width", "an integer, not a boolean"),
    (b'{"prompt": "x", "guidance_scale": true}', "guidance_scale", "a number, not a boolean"),
    (b'{"prompt": "x", "guidance_scale": "3"}', "guidance_scale", "a number, not a string"),
    (b'{"prompt": "x", "n": null}', "n", "not null"),
    (b'{"prompt": "x", "stream": 1}', "stream", "true or false"),
    (b'{"prompt": "x", "stream": "true"}', "stream", "true or false"),
    (b'{"prompt": "x", "seed": "1"}', "seed", "an integer or a list of them"),
    (b'{"prompt": "x", "seed": [1.5]}', "seed", "seed[0]"),
    (b'{"prompt": "x", "extra": []}', "extra", "an object, not a list"),
    (b'{"prompt": "x", "output_format": 3}', "output_format", "a string, not a number"),
    (b'{"prompt": "x", "widht": 64}', "widht", "did you mean width"),
    (b'{"prompt": "x", "quite_unknown": 64}', "quite_unknown", "known are"),
    (b'{"prompt": "x", "lora": "a"}', "lora", "must be a list of objects with a name and a scale, not a string"),
    (b'{"prompt": "x", "lora": ["a"]}', "lora", "lora[0] must be an object, not a string"),
    (b'{"prompt": "x", "lora": [{"scale": 1}]}', "lora", "lora[0].name is required"),
    (b'{"prompt": "x", "lora": [{"name": "a", "scale": "1"}]}', "lora", "lora[0].scale must be a number, not a string"),
    (b'{"prompt": "x", "lora": [{"name": "a", "path": "b"}]}', "lora", "no lora[0].path"),
]

INVALID = [
    (b'{"prompt": []}', "prompt", "between 1 and"),
    (b'{"prompt": ["a","a","a","a","a","a","a","a","a"]}', "prompt", "between 1 and 8 outputs"),
    (b'{"prompt": "' + b"x" * 51 + b'"}', "prompt", "between 0 and 50 characters"),
    (b'{"prompt": "x", "negative_prompt": "' + b"x" * 51 + b'"}', "negative_prompt", "50"),
    (b'{"prompt": "x", "width": 0}', "width", "between 1 and"),
    (b'{"prompt": "x", "width": -64}', "width", "between 1 and"),
    (b'{"prompt": "x", "width": 8}', "width", "a multiple of 16 between 16 and"),
    (b'{"prompt": "x", "height": 65}', "height", "a multiple of 16"),
    (b'{"prompt": "x", "width": 1024}', "width", "between 256 and 16384 pixels"),
    (b'{"prompt": "x", "height": 1024}', "height", "between 256 and 16384 pixels"),
    (b'{"prompt": "x", "width": 1000000000000}', "width", "between"),
    (b'{"prompt": "x", "num_inference_steps": 0}', "num_inference_steps", "between 1 and 100"),
    (b'{"prompt": "x", "num_inference_steps": 1000000000}', "num_inference_steps", "between 1 and 100"),
    (b'{"prompt": "x", "num_inference_steps": 1' + b"0" * 40 + b"}", "num_inference_steps", "between 1 and 100"),
    (b'{"prompt": "x", "guidance_scale": -0.1}', "guidance_scale", "between 0 and 1000"),
    (b'{"prompt": "x", "guidance_scale": 1e30}', "guidance_scale", "between 0 and 1000"),
    (b'{"prompt": "x", "true_cfg_scale": 2}', "true_cfg_scale", "does not take true_cfg_scale"),
    (b'{"prompt": "x", "num_frames": 9}', "num_frames", "does not take num_frames"),
    (b'{"prompt": "x", "fps": 9}', "fps", "makes no videos"),
    (b'{"prompt": "x", "n": 0}', "n", "between 1 and 8"),
    (b'{"prompt": "x", "n": 9}', "n", "between 1 and 8"),
    (b'{"prompt": ["x", "y"], "n": 5}', "n", "make 10"),
    (b'{"prompt": "x", "num_outputs_per_prompt": 9}', "num_outputs_per_prompt", "between 1 and 8"),
    (b'{"prompt": "x", "n": 2, "num_outputs_per_prompt": 3}', "n", "the same"),
    (b'{"prompt": "x", "seed": -1}', "seed", "between 0 and 9223372036854775807"),
    (b'{"prompt": "x", "seed": 9223372036854775808}', "seed", "between 0 and"),
    (b'{"prompt": "x", "n": 2, "seed": 9223372036854775807}', "seed", "between 0 and"),
    (b'{"prompt": "x", "seed": 1' + b"0" * 60 + b"}", "seed", "between 0 and"),
    (b'{"prompt": ["x", "y"], "n": 2, "seed": [1, 2, 3]}', "seed", "1 or 2 or 4"),
    (b'{"prompt": "x", "seed": []}', "seed", "elements"),
    (b'{"prompt": "x", "priority": 99999999}', "priority", "between"),
    (b'{"prompt": "x", "timeout_s": 0}', "timeout_s", "between 0.001 and"),
    (b'{"prompt": "x", "timeout_s": -1}', "timeout_s", "between 0.001 and"),
    (b'{"prompt": "x", "output_format": "gif"}', "output_format", "one of png, jpeg, webp"),
    (b'{"prompt": "x", "output_format": "mp4"}', "output_format", "one of png, jpeg, webp"),
    (b'{"prompt": "x", "preview_every": -1}', "preview_every", "between 0 and"),
    (b'{"prompt": "x", "preview_every": 1}', "preview_every", "needs stream"),
    (b'{"prompt": "x", "cache": "medium"}', "cache", "off, balanced, fast, or a number from 0 to 1, not 'medium'"),
    (b'{"prompt": "x", "cache": "1.5"}', "cache", "from 0 to 1"),
    (b'{"prompt": "x", "cache": 1.5}', "cache", "between 0 and 1"),
    (b'{"prompt": "x", "cache": "fast", "deterministic": true}', "cache", "computes every forward"),
    (b'{"prompt": "x", "image": "aaaa"}', "image", "takes no image: none fits"),
    (b'{"prompt": "x", "lora": [{"name": "a"}, {"name": "a"}]}', "lora", "named twice"),
    (b'{"prompt": "x", "lora": [{"name": "a", "scale": 101}]}', "lora", "lora[0].scale is out of range"),
    (b'{"prompt": "x", "lora": [{"name": ""}]}', "lora", "lora[0].name is out of range"),
    (b'{"prompt": "x", "lora": [' + b'{"name": "a"},' * 16 + b'{"name": "b"}]}', "lora", "at most 16"),
    (b'{"prompt": "x", "extra": {"width": 64}}', "extra.width", "a field of the request itself"),
    (b'{"prompt": "x", "extra": {"max_sequence_lenght": 64}}', "extra.max_sequence_lenght", "max_sequence_length"),
    (b'{"prompt": "x", "extra": {"generator": 1}}', "extra.generator", "has no argument"),
    (b'{"prompt": "x", "extra": {"max_sequence_length": "9"}}', "extra.max_sequence_length", "int, not str"),
    (b'{"prompt": "x", "extra": {"max_sequence_length": true}}', "extra.max_sequence_length", "int, not bool"),
    (b'{"prompt": "x", "extra": {"max_sequence_length": null}}', "extra.max_sequence_length", "int, not null"),
    (b'{"prompt": "x", "extra": {"prompt_2": "' + b"x" * 51 + b'"}}', "extra.prompt_2", "50 characters"),
    (b'{"prompt": "x", "extra": {"sigmas": [' + b"1," * 100 + b"1]}}", "extra.sigmas", "between 1 and 100"),
    (b'{"prompt": "x", "extra": {"prompt_2": ' + b"[" * 900 + b"]" * 900 + b"}}", "extra", "32 deep"),
    (b'{"prompt": "x", "extra": {"joint_attention_kwargs": ' + b'{"a":' * 900 + b"1" + b"}" * 902, "extra", "32 deep"),
]


@pytest.mark.parametrize(("body", "field", "words"), MALFORMED)
def test_a_body_that_cannot_be_read_is_malformed_and_names_the_field(
    body: bytes, field: str | None, words: str
) -> None:
    with pytest.raises(Malformed) as raised:
        read(body)
    assert raised.value.field == field
    assert words in raised.value.message


@pytest.mark.parametrize(("body", "field", "words"), INVALID)
def test_a_value_out_of_range_names_the_field_and_the_range(body: bytes, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read(body)
    assert raised.value.field == field
    assert words in raised.value.message


@pytest.mark.parametrize(
    ("value", "parameter", "words"),
    [
        (100_001, Parameter(["int"], 1024, maximum=100_000), "between 1 and 100000, not 100001"),
        ([2, 10**9], Parameter(["list"], [10, 10], maximum=50), "between 1 and 50, not 1000000000"),
        ([0, 1], Parameter(["list"], [10, 10], maximum=50), "between 1 and 50, not 0"),
        (-1, Parameter(["int"], 0, maximum=50), "between 0 and 50, not -1"),
    ],
)
def test_a_value_beyond_the_largest_of_its_argument_is_refused(value: Any, parameter: Parameter, words: str) -> None:
    model = replace(IMAGE_MODEL, arguments={"amount": parameter})
    check_model(GenerateBody(prompt=["x"], extra={"amount": parameter.default}), 0, model, Config())
    with pytest.raises(InvalidRequest, match=f"extra.amount must be {words}") as raised:
        check_model(GenerateBody(prompt=["x"], extra={"amount": value}), 0, model, Config())
    assert raised.value.field == "extra.amount"


def test_a_minimal_body_leaves_everything_to_the_pipeline() -> None:
    message = read(b'{"prompt": "a red circle"}')
    assert [sample.prompt for sample in message.samples] == ["a red circle"]
    assert 0 <= message.samples[0].seed < 2**32
    assert (message.width, message.height, message.num_inference_steps, message.guidance_scale) == (None,) * 4
    assert message.timeout_s == CONFIG.request_timeout_s


@pytest.mark.parametrize("cache", ["off", "balanced", "fast", "0.2", 0.2, 0, 1])
def test_a_threshold_of_the_step_cache_has_a_name_or_is_a_number(cache: str | float) -> None:
    assert read(orjson.dumps({"prompt": "a", "cache": cache})).cache == cache


def test_every_field_reaches_the_message() -> None:
    message = read(
        b'{"prompt": "a", "negative_prompt": "b", "width": 32, "height": 48, "num_inference_steps": 3, "priority": 2,'
        b'"guidance_scale": 2, "deterministic": true, "stream": true, "preview_every": 1, "timeout_s": 9,'
        b'"extra": {"max_sequence_length": 64, "guidance_rescale": 1}}'
    )
    assert (message.negative_prompt, message.width, message.height, message.num_inference_steps) == ("b", 32, 48, 3)
    assert (message.guidance_scale, message.deterministic, message.progress, message.preview_every) == (
        2,
        True,
        True,
        1,
    )
    assert (message.timeout_s, message.priority) == (9, 2)
    assert message.extra == {"max_sequence_length": 64, "guidance_rescale": 1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (b'"prompt": "a", "seed": 5', [("a", 5)]),
        (b'"prompt": "a", "seed": 5, "n": 3', [("a", 5), ("a", 6), ("a", 7)]),
        (b'"prompt": "a", "seed": 5, "num_outputs_per_prompt": 2', [("a", 5), ("a", 6)]),
        (b'"prompt": ["a", "b"], "seed": 5, "n": 2', [("a", 5), ("a", 6), ("b", 5), ("b", 6)]),
        (b'"prompt": ["a", "b"], "seed": [5, 9], "n": 2', [("a", 5), ("a", 6), ("b", 9), ("b", 10)]),
        (b'"prompt": ["a", "b"], "seed": [1, 3, 2, 4], "n": 2', [("a", 1), ("a", 3), ("b", 2), ("b", 4)]),
        (b'"prompt": "a", "seed": [8, 3], "n": 2', [("a", 8), ("a", 3)]),
        (b'"prompt": "a", "seed": 9223372036854775807', [("a", 2**63 - 1)]),
    ],
)
def test_output_i_of_n_uses_seed_plus_i(fields: bytes, words: list[tuple[str, int]]) -> None:
    message = read(b"{" + fields + b"}")
    assert [(sample.prompt, sample.seed) for sample in message.samples] == words


def test_chosen_seeds_of_one_prompt_count_up() -> None:
    seeds = [sample.seed for sample in read(b'{"prompt": ["a", "b"], "n": 3}').samples]
    assert [seed - seeds[0] for seed in seeds[:3]] == [0, 1, 2]
    assert seeds[0] != seeds[3]


def test_a_list_of_a_million_wrong_prompts_is_refused_in_little_more_time_than_it_is_parsed() -> None:
    body = b'{"prompt": [' + b"1," * 1_000_000 + b"1]}"

    def seconds(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    def refused() -> None:
        with pytest.raises(Malformed):
            read(body)

    assert seconds(refused) < 10 * seconds(lambda: orjson.loads(body))
