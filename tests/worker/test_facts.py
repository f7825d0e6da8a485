"""Dtypes and devices are read once for all requests, and never hide what a request or an operation has changed."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import get_module_execution_device
from torch import nn

from safelight.worker.crossing.facts import Facts
from safelight.worker.crossing.fork import Fork


class Denoiser(ModelMixin, ConfigMixin):
    walks: ClassVar[int] = 0

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        Denoiser.walks += 1
        return super().named_modules(*args, **kwargs)


class Pipeline(DiffusionPipeline):
    def __init__(self, transformer: Denoiser) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    def device_of_denoiser(self) -> torch.device:
        return get_module_execution_device(self.transformer)


def test_sixteen_requests_walk_through_the_modules_as_often_as_one() -> None:
    pipeline, facts = Pipeline(Denoiser()), Facts()

    def ask() -> int:
        before = Denoiser.walks
        with Fork(pipeline, facts=facts) as fork:
            for _ in range(8):
                assert (fork.transformer.dtype, fork.transformer.device) == (torch.float32, torch.device("cpu"))
                assert fork._execution_device == fork.device == torch.device("cpu")
        return Denoiser.walks - before

    assert ask() > 0
    assert [ask() for _ in range(15)] == [0] * 15


def test_a_pipeline_that_asks_for_a_component_s_execution_device_walks_once_for_all_requests() -> None:
    pipeline, facts = Pipeline(Denoiser()), Facts()

    def ask() -> int:
        before = Denoiser.walks
        with Fork(pipeline, facts=facts) as fork:
            assert fork.device_of_denoiser() == torch.device("cpu")
        return Denoiser.walks - before

    assert ask() > 0
    assert ask() == 0
    with Fork(pipeline, facts=facts) as fork:
        fork.transformer.to("meta")
        assert fork.device_of_denoiser() == torch.device("meta")


def test_a_request_that_casts_a_component_sees_its_new_dtype_and_the_others_do_not() -> None:
    pipeline, facts = Pipeline(Denoiser()), Facts()
    with Fork(pipeline, facts=facts) as fork:
        assert fork.transformer.dtype == torch.float32
        fork.transformer.to(torch.bfloat16)
        assert fork.transformer.dtype == torch.bfloat16
    with Fork(pipeline, facts=facts) as fork:
        assert fork.transformer.dtype == torch.float32


def test_a_request_that_replaces_a_weight_s_data_sees_its_new_dtype_and_the_others_do_not() -> None:
    pipeline, facts = Pipeline(Denoiser()), Facts()
    with Fork(pipeline, facts=facts) as fork:
        for weight in fork.transformer.parameters():
            weight.data = weight.data.double()
        assert fork.transformer.dtype == torch.float64
    with Fork(pipeline, facts=facts) as fork:
        assert fork.transformer.dtype == torch.float32


def test_a_request_that_moves_a_component_sees_its_pipeline_s_new_device() -> None:
    pipeline, facts = Pipeline(Denoiser()), Facts()
    with Fork(pipeline, facts=facts) as fork:
        assert fork._execution_device == torch.device("cpu")
        fork.transformer.to("meta")
        assert fork._execution_device == fork.device == fork.transformer.device == torch.device("meta")
    with Fork(pipeline, facts=facts) as fork:
        assert fork._execution_device == torch.device("cpu")


def test_an_operation_that_converts_the_weights_is_seen_afterwards() -> None:
    pipeline, facts = Pipeline(Denoiser()), Facts()
    with Fork(pipeline, facts=facts) as fork:
        assert fork.transformer.dtype == torch.float32
    pipeline.transformer.to(torch.bfloat16)
    facts.forget()
    with Fork(pipeline, facts=facts) as fork:
        assert fork.transformer.dtype == torch.bfloat16


def test_the_fork_of_a_pipeline_is_of_its_class_under_the_same_name() -> None:
    pipeline = Pipeline(Denoiser())
    with Fork(pipeline) as fork:
        assert isinstance(fork, Pipeline)
        assert (type(fork).__name__, type(fork).__module__) == (Pipeline.__name__, Pipeline.__module__)
        assert type(pipeline) is Pipeline


def test_the_fork_of_a_pipeline_has_its_components_without_reading_the_signature_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = Pipeline(Denoiser())
    Fork(pipeline)
    monkeypatch.setattr(inspect, "signature", None)
    with Fork(pipeline) as fork:
        assert list(fork.components) == ["transformer"]
        assert fork.components["transformer"] is fork.transformer
