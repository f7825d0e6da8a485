"""A field or an output format that the table has is known everywhere, and nowhere under another name or range."""

from __future__ import annotations

import inspect
from typing import get_args

import msgspec
import pytest

from safelight.client import AsyncClient, Client, calls, rollout_calls
from safelight.client.cli import generate
from safelight.client.results import SUFFIXES
from safelight.protocol.config import Config
from safelight.protocol.errors import InvalidRequest
from safelight.protocol.fields import TABLE
from safelight.protocol.generation import Generate
from safelight.protocol.output_formats import FORMATS, OutputFormat
from safelight.protocol.rollouts import ROLLOUT, Rollout
from safelight.server.request_validation import check_ranges
from safelight.server.rollout_body import RolloutBody
from safelight.server.schemas import GenerateBody


@pytest.mark.parametrize("name", TABLE)
def test_a_field_is_missing_nowhere(name: str) -> None:
    row = TABLE[name]
    assert GenerateBody.model_fields[name].description == row.field.help
    assert name in {field.name for field in msgspec.structs.fields(Generate)}
    for owner in (Client, AsyncClient):
        assert {name, row.alias} <= inspect.signature(owner.generate).parameters.keys()
    assert row.alias in inspect.signature(generate).parameters


def test_every_field_of_a_generation_is_reachable_from_the_client_and_the_command_line() -> None:
    """``n`` is ``num_outputs_per_prompt``; ``Client.stream`` streams, as the command line always does, which takes the
    format from the name of the file."""
    fields = {TABLE[name].alias if name in TABLE else name for name in GenerateBody.model_fields}
    fields -= {"stream", "num_outputs_per_prompt"}
    assert fields <= inspect.signature(Client.generate).parameters.keys()
    assert inspect.signature(Client.stream).parameters == inspect.signature(Client.generate).parameters
    assert fields - {"output_format"} <= inspect.signature(generate).parameters.keys()


def test_an_editor_sees_every_field_with_its_type() -> None:
    """The client declares the fields, as no checker runs the code that would make a signature from the table."""
    own = {"prompt", "seed", "n", "image", "lora", "output_format", "extra", "arguments"}
    declared = {name: one.annotation for name, one in inspect.signature(calls.generate).parameters.items()}
    table = {name: row.type for row in TABLE.values() for name in (row.name, row.alias) if name != "extra"}
    assert declared.keys() == table.keys() | own
    for name, kind in table.items():
        assert eval(declared[name], vars(calls)) == kind | None, name


def test_a_field_of_a_rollout_is_missing_nowhere() -> None:
    own = {"prompt", "initial_noise", "denoise_seeds", "arguments"}
    assert {row.alias for row in ROLLOUT.values()} | own == inspect.signature(rollout_calls.rollout).parameters.keys()
    made = {"initial_noise", "step_noise"}  # by the server
    assert {row.attribute for row in ROLLOUT.values()} | made == set(Rollout.__struct_fields__)
    for name, row in ROLLOUT.items():
        assert RolloutBody.model_fields[name].description == row.field.help
    sent = rollout_calls.rollout("a", sampler="cps", debug=True, return_steps=range(2), extra={"eta": 1}).body
    assert sent is not None
    assert RolloutBody(**{**sent, "prompt": ["a"]}).plan == Rollout(
        sampler="cps", returns_debug=True, returns_trajectory=True, step_indices=[0, 1]
    )


@pytest.mark.parametrize("name", [row.name for row in TABLE.values() if row.field.low is not None])
def test_a_range_of_the_table_is_the_server_s(name: str) -> None:
    low, high = TABLE[name].field.low, TABLE[name].field.high
    config = Config(max_pixels=4096)
    most = getattr(config, high) if isinstance(high, str) else high
    assert low is not None
    for inside in (low, most):
        check_ranges(GenerateBody.model_construct(prompt=["a"], n=1, stream=True, **{name: inside}), config)
    for outside in (low - 1, most + 1):
        with pytest.raises(InvalidRequest, match=f"{name} must be between"):
            check_ranges(GenerateBody.model_construct(prompt=["a"], n=1, stream=True, **{name: outside}), config)


def test_a_format_has_a_media_type_and_a_suffix_of_its_own() -> None:
    assert set(FORMATS) == set(get_args(OutputFormat)) == set(SUFFIXES.values())
    assert len({one.media_type for one in FORMATS.values()}) == len(FORMATS)
    assert len(SUFFIXES) == sum(len(one.suffixes) for one in FORMATS.values())
