"""The program of each rank of a trainer, for :mod:`.test_sharded_weights`; its processes find it by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import T5EncoderModel

from safelight.client import Client, TensorsRejected, WeightUpdate
from safelight.client.named_tensors import read
from safelight.tests.client.tensors import SEVERAL, Tensors, plus
from safelight.worker.parallel.ranks import Ranks


def send_each_way(ranks: Ranks, url: str, flux: Path, results: Path) -> None:
    """Update in every way of :data:`WAYS`; the server's checksums after each are written to ``results``."""
    read_parameters_smaller_than_the_group(ranks)
    checksums = {}
    with Client(url) as client:
        for name, (send, number) in WAYS.items():
            done = send(ranks, client, flux, number)
            if ranks.rank == 0:
                assert done is not None
                assert done.applied == done.expected, name
                checksums[name] = client.weights.checksum()
            else:
                assert done is None, name
    if ranks.rank == 0:
        results.write_text(json.dumps(checksums))


def read_parameters_smaller_than_the_group(ranks: Ranks) -> None:
    """The last rank has no element of any parameter, and takes part for each of them, once for a tied one."""
    first, last = nn.Linear(4, 1), nn.Linear(4, 1)
    last.weight = first.weight
    model = nn.Sequential(first, nn.Linear(4, 1), last)
    fully_shard(model)
    given = read(model)
    if ranks.rank == 0:
        assert [tensor.name for tensor in given.tensors] == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    else:
        given.take_part()


def dtensors(ranks: Ranks, client: Client, flux: Path, number: float) -> WeightUpdate | None:
    return client.weights.update(_dtensors(ranks, flux, number), bucket_bytes=SEVERAL)


def begun(ranks: Ranks, client: Client, flux: Path, number: float) -> WeightUpdate | None:
    tensors = list(_dtensors(ranks, flux, number).items())
    with client.weights.begin() as update:
        update.update(tensors[:7])
        update.update(dict(tensors[7:]))
    client.weights.verify(dict(tensors))
    return update.result


def after_an_error(ranks: Ranks, client: Client, flux: Path, number: float) -> WeightUpdate | None:
    """The first bucket is rejected while the other rank has most of its tensors still to give."""
    tensors = _dtensors(ranks, flux, number)
    wrong = {"none.such": next(iter(tensors.values())), **tensors}
    if ranks.rank == 0:
        with pytest.raises(TensorsRejected, match=r"none\.such"):
            client.weights.update(wrong, bucket_bytes=SEVERAL)
    else:
        assert client.weights.update(wrong, bucket_bytes=SEVERAL) is None
    return client.weights.update(tensors)


def fsdp2(ranks: Ranks, client: Client, flux: Path, number: float) -> WeightUpdate | None:
    model = _transformer(flux, number)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        fully_shard(block)
    fully_shard(model)
    return client.weights.update(model, bucket_bytes=SEVERAL)


def fsdp1(ranks: Ranks, client: Client, flux: Path, number: float) -> WeightUpdate | None:
    model = FullyShardedDataParallel(_transformer(flux, number), device_id=torch.device("cpu"))
    return client.weights.update(model, bucket_bytes=SEVERAL)


def fsdp1_with_orig_params(ranks: Ranks, client: Client, flux: Path, number: float) -> WeightUpdate | None:
    model = _transformer(flux, number)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    return client.weights.update(wrapped, bucket_bytes=SEVERAL)


def text_encoder(ranks: Ranks, client: Client, flux: Path, number: float) -> WeightUpdate | None:
    """A module of transformers, whose embedding has two names."""
    model = _add(T5EncoderModel.from_pretrained(flux / "text_encoder_2"), number)
    fully_shard(model)
    return client.weights.update(model, target_module="text_encoder_2")


WAYS = {
    "dtensors": (dtensors, 0.1),
    "begun": (begun, 0.2),
    "after_an_error": (after_an_error, 0.3),
    "fsdp2": (fsdp2, 0.4),
    "fsdp1": (fsdp1, 0.5),
    "fsdp1_with_orig_params": (fsdp1_with_orig_params, 0.6),
    "text_encoder": (text_encoder, 0.7),
}
"""Each with the number that it adds to every parameter."""


def _dtensors(ranks: Ranks, flux: Path, number: float) -> Tensors:
    """Shards, of different sizes where the ranks do not divide a dimension; the first tensor is not divided."""
    mesh = init_device_mesh("cpu", (ranks.size,))
    whole = plus(load_file(flux / "transformer" / "diffusion_pytorch_model.safetensors"), number)
    kept, *divided = whole
    parts = {name: distribute_tensor(whole[name], mesh, [Shard(whole[name].ndim - 1)]) for name in divided}
    return {kept: whole[kept], **parts}


def _transformer(flux: Path, number: float) -> FluxTransformer2DModel:
    return _add(FluxTransformer2DModel.from_pretrained(flux / "transformer"), number)


def _add(model: nn.Module, number: float) -> nn.Module:
    for parameter in model.parameters():
        parameter.add_(number)
    return model
