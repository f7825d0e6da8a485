"""The body of ``POST /rollout/generate``: the fields of ``/generate``, the sampler, and the records to return."""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import itertools
import math
from typing import Annotated, Any, TypeGuard

import msgspec
import numpy as np
from fastapi import Request
from pydantic import Field

from ..formats.tensor_files import BadTensorFile, read_header
from ..protocol.codec import Buffer
from ..protocol.config import Config
from ..protocol.errors import BodyTooLarge, InvalidRequest, Malformed
from ..protocol.replicas import ModelInfo
from ..protocol.rollouts import MAX_NOISE, ROLLOUT, TENSOR, Rollout, StepNoise, Tensor
from ..protocol.step_caching import asks_for_cache
from .body_validation import read_object, refuse_query, validate, without_nulls
from .bounded import MAX_TEXT, parse, read_body, read_msgpack
from .request_validation import Range, check_table
from .schemas import LIST, GenerateBody, with_fields

_LEAST = 1e-6  # of a sigma, and between two
_FARTHEST = 1e4  # of a number in initial noise


@with_fields(ROLLOUT)
class RolloutBody(
    GenerateBody,
    json_schema_extra={"example": {"prompt": "a red circle", "num_inference_steps": 10, "rollout_sde_type": "cps"}},
):
    """The prompt and settings, the sampler, and the records to return."""

    denoise_seeds: Annotated[list[str], LIST] | None = Field(
        None, description="A seed of the steps' noise for each sample, apart from that of its first noise"
    )
    initial_noise: dict[str, Any] | None = Field(
        None, description="A float32 tensor, one row for each sample or one for all, each like the first of its latents"
    )
    image_path: Annotated[list[str], LIST] | None = Field(
        None, description="In place of image: files below the roots that the server allows"
    )
    suppress_logs: bool | None = Field(None, description="Accepted; a request has one line in the log in any case")
    extra_sampling_params: dict[str, Any] | None = Field(
        None, description="Fields of this body that stand elsewhere here, and arguments as in `extra`"
    )

    @functools.cached_property
    def plan(self) -> Rollout:
        """The sampler and the records, without initial noise and its seeds."""
        return Rollout(**{row.attribute: getattr(self, name) for name, row in ROLLOUT.items()})


async def read_rollout(request: Request) -> RolloutBody:
    """The body, JSON or msgpack. Raises ``Malformed`` and ``InvalidRequest``."""
    refuse_query(request)
    data = await read_body(request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/msgpack":
        body = await asyncio.to_thread(lambda: _validated(read_msgpack(data)))
    else:
        body = await parse(data, lambda body: _validated(read_object(body)))
    if body.image is None and body.initial_noise is None and len(data) > MAX_TEXT:
        raise BodyTooLarge(f"A rollout without images and initial_noise may have {MAX_TEXT / 1e6:g} MB.")
    return body


def _validated(value: dict[str, Any]) -> RolloutBody:
    """``value``, with what is in ``extra_sampling_params`` where it belongs. A field that is null is left out."""
    value = without_nulls(value)
    params, extra = value.get("extra_sampling_params"), value.get("extra", {})
    if not _is_object(params) or not _is_object(extra):
        return validate(value, RolloutBody)
    params = without_nulls(params)
    fields = {name: item for name, item in params.items() if name in RolloutBody.model_fields}
    further = {name: item for name, item in params.items() if name not in RolloutBody.model_fields}
    if twice := sorted((value.keys() | extra.keys()) & params.keys()):
        raise InvalidRequest(f"{twice[0][:100]} is given twice, in extra_sampling_params too.", field=twice[0][:100])
    within = fields.pop("extra", {})
    if not isinstance(within, dict):
        return validate({**value, "extra": within}, RolloutBody)
    return validate({**value, **fields, "extra": {**extra, **within, **further}}, RolloutBody)


def _is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """True if every key of ``value`` is a string: msgpack allows other keys."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def check_rollout(body: RolloutBody, model: ModelInfo, config: Config) -> None:
    """Raise ``InvalidRequest`` for what cannot be rolled out."""
    plan = body.plan
    if model.no_rollout is not None and (plan.recorded or plan.sigmas is not None):
        field = "rollout" if plan.recorded else "sigmas"
        raise InvalidRequest(f"{model.pipeline} cannot be rolled out: {model.no_rollout}.", field=field)
    if body.stream or body.settings.preview_every:
        raise InvalidRequest("A rollout has no stream; leave out stream and preview_every.", field="stream")
    if asks_for_cache(body.settings.cache):
        raise InvalidRequest("A rollout computes every forward; leave out cache.", field="cache")
    if body.output_format not in (None, "pt"):
        raise InvalidRequest("A rollout's outputs are tensors; leave out output_format.", field="output_format")
    for name in ("sigmas", "timesteps"):
        if name in body.settings.extra:
            raise InvalidRequest(f"A rollout takes its schedule as sigmas, not in extra.{name}.", field=f"extra.{name}")
    Range(0, MAX_NOISE[plan.sampler]).check("rollout_noise_level", plan.noise_level)
    check_table(body, ROLLOUT, config)
    _check_indices("rollout_sde_step_indices", plan.sde_steps, config.max_steps - 1)
    _check_indices("rollout_return_step_indices", plan.step_indices, config.max_steps)
    if body.image is not None and body.image_path is not None:
        raise InvalidRequest("Give either image or image_path.", field="image_path")
    if plan.generator_device == "cuda" and not model.device.startswith("cuda"):
        raise InvalidRequest(f"The model is on {model.device}, and no noise on a GPU.", field="generator_device")
    if plan.sigmas is not None:
        _check_sigmas(plan.sigmas, body.settings.num_inference_steps, config)


def _check_indices(name: str, indices: list[int] | None, most: int) -> None:
    if indices is None:
        return
    if len(set(indices)) < len(indices) or not all(0 <= index <= most for index in indices):
        raise InvalidRequest(f"{name} must be different numbers, from 0 to {most}.", field=name)


def _check_sigmas(sigmas: list[float], steps: int | None, config: Config) -> None:
    noisy = sigmas[:-1] if sigmas and sigmas[-1] == 0 else sigmas
    falls = all(after <= before - _LEAST for before, after in itertools.pairwise(noisy))
    if not 1 <= len(noisy) <= config.max_steps or not falls or not all(_LEAST <= sigma <= 1 for sigma in noisy):
        raise InvalidRequest(
            f"sigmas must fall from at most 1, by {_LEAST:g} each and not below it, in 1 to {config.max_steps} "
            "numbers; 0 may follow.",
            field="sigmas",
        )
    if steps not in (None, len(noisy)):
        raise InvalidRequest(
            f"sigmas are {len(noisy)} steps, and num_inference_steps is {steps}; leave it out.",
            field="num_inference_steps",
        )


def to_rollout(body: RolloutBody, outputs: int) -> Rollout:
    """Raises ``InvalidRequest`` where initial noise or seeds are not for so many outputs."""
    noise = [] if body.initial_noise is None else _rows(_tensor(body.initial_noise), outputs)
    seeds = None if body.denoise_seeds is None else _step_noise(body.denoise_seeds, body.seed, outputs)
    return msgspec.structs.replace(body.plan, initial_noise=noise, step_noise=seeds)


def _step_noise(keys: list[str], seed: list[int] | None, outputs: int) -> StepNoise:
    if len(keys) != outputs:
        raise InvalidRequest(
            f"denoise_seeds must have one for each of the {outputs} outputs, not {len(keys)}.", field="denoise_seeds"
        )
    return StepNoise(keys, seed[0] if seed is not None and len(seed) == 1 else None)


def _tensor(value: dict[str, Any]) -> Tensor:
    """The tensor that a reply's map stands for; in JSON its data is base64."""
    data = value.get("data")
    try:
        given = base64.b64decode(data, validate=True) if isinstance(data, str) else data
        if value.get(TENSOR) is not True or not isinstance(given, bytes):
            raise Malformed("initial_noise must be a tensor as replies have them.", field="initial_noise")
        (stored,) = read_header(given, len(given))
    except (binascii.Error, BadTensorFile, ValueError):
        raise Malformed("initial_noise has no safetensors file with one tensor.", field="initial_noise") from None
    if stored.dtype != "F32":
        raise InvalidRequest(f"initial_noise must be float32, not {stored.dtype}.", field="initial_noise")
    return Tensor("torch.float32", list(stored.shape), Buffer(memoryview(given)[stored.start :]))


def _rows(noise: Tensor, outputs: int) -> list[Tensor]:
    rows = noise.shape[0] if noise.shape else 0
    if rows not in (1, outputs) or not math.prod(noise.shape):
        raise InvalidRequest(
            f"initial_noise must have one row, or one for each of the {outputs} outputs, not {rows}.",
            field="initial_noise",
        )
    numbers = np.frombuffer(noise.data.data, np.float32)
    if not (np.abs(numbers) <= _FARTHEST).all():
        raise InvalidRequest(f"initial_noise must be finite and within ±{_FARTHEST:g}.", field="initial_noise")
    size = len(noise.data) // rows
    shape = [1, *noise.shape[1:]]
    return [Tensor(noise.dtype, shape, Buffer(noise.data.data[i * size : (i + 1) * size])) for i in range(rows)]
