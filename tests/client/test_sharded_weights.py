"""Two ranks of a trainer, each with its shards, write what one process with whole tensors would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from safelight.client import Client
from safelight.tests.client import trainer_ranks
from safelight.tests.live import LiveServer
from safelight.tests.ranks import on_ranks

from .tensors import Tensors, digest, plus

Checksums = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def checksums(flux_server: LiveServer, flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Checksums:
    """The digests on the server after each of the ways in which two ranks sent."""
    results = tmp_path_factory.mktemp("ranks") / "checksums.json"
    on_ranks(2, trainer_ranks.send_each_way, flux_server.url, flux, results)
    with Client(flux_server.url) as client:
        client.weights.update_from_disk(flux)
    found: Checksums = json.loads(results.read_text())
    return found


@pytest.mark.parametrize("way", [way for way in trainer_ranks.WAYS if way != "text_encoder"])
def test_shards_arrive_whole(way: str, checksums: Checksums, own: Tensors) -> None:
    _, number = trainer_ranks.WAYS[way]
    assert checksums[way]["transformer"] == digest(plus(own, number))


def test_a_sharded_text_encoder_has_the_names_of_its_checkpoint(checksums: Checksums, flux: Path) -> None:
    _, number = trainer_ranks.WAYS["text_encoder"]
    saved = load_file(flux / "text_encoder_2" / "model.safetensors")
    assert checksums["text_encoder"]["text_encoder_2"] == digest(plus(saved, number))
