"""Tensor-parallel replicas, through the whole system."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from safelight.client.checksum import checksum
from safelight.formats.model_names import resolve_model
from safelight.tests.effort import chosen
from safelight.tests.forked import run
from safelight.tests.live import LiveServer
from safelight.tests.serving import Servers

from .asking import ask, ask_together, body, load_plain, metric, picture, plain

FAMILIES = chosen(
    "flux", "sd3", "zimage", "wan22", nightly=["flux2", "qwenimage", "wan", "ltx", "hunyuan_video", "hunyuan_video15"]
)
FOUR_RANKS = chosen("flux", nightly=["zimage", "wan"])
"""Four processes a server; the components of every family, divided by four and fused, are compared elsewhere."""
COMPILED = ("--compile", "on", "--compile-sizes", "64x64")
TOLERANCE = 1e-4


def on_ranks(family: str, tp: str, *flags: str) -> Any:
    group = pytest.mark.xdist_group(family)
    return pytest.param(family, ("--tp", tp, *flags), marks=group, id="-".join((tp, *flags[1:], family)))


@pytest.mark.parametrize(
    ("family", "flags"),
    [on_ranks(family, "2") for family in FAMILIES]
    + [on_ranks(family, "4", "--fuse-projections") for family in FOUR_RANKS]
    + [on_ranks("flux", "1", "--ulysses", "2", "--cfg-parallel")]
    + [on_ranks(family, "1", "--ulysses", "2") for family in chosen(nightly=["flux2", "qwenimage", "wan22"])]
    + [on_ranks(family, "2", "--ulysses", "2") for family in chosen(nightly=["flux", "wan"])]
    + [on_ranks(family, "1", "--cfg-parallel") for family in chosen(nightly=["sd3", "wan", "zimage", "sdxl"])]
    + [on_ranks(family, "1", "--cfg-parallel", *COMPILED) for family in chosen(nightly=["zimage"])]
    + [on_ranks(family, "1", *COMPILED) for family in chosen(nightly=["zimage"])],
)
def test_several_ranks_make_the_picture_of_one(
    family: str, flags: tuple[str, ...], checkpoint: Callable[[str], Path], servers: Servers
) -> None:
    pipeline = load_plain(checkpoint(family))
    server = servers(family, *flags)
    url = server.url
    asked = [body(family, index) for index in range(3)]
    together = [picture(answer.json()) for answer in ask_together(url, asked)]
    expected = [plain(pipeline, one) for one in asked]
    for found, wanted in zip(together, expected, strict=True):
        assert (found - wanted).abs().max() <= TOLERANCE
    alone = [picture(ask(url, asked[0] | {"deterministic": True})) for _ in range(2)]
    assert (alone[0] == alone[1]).all()
    assert (alone[0] - expected[0]).abs().max() <= TOLERANCE
    ask(url, body(family, num_inference_steps=12, cache=1.0))  # the ranks skip the same steps
    if "--cfg-parallel" in flags:
        server.wait_for(lambda: metric(url, "safelight_replica_divided_forwards_total") > 0 or None, 60)
    if "--compile" in flags:
        server.wait_for(lambda: metric(url, "safelight_compiled_block_calls_total") > 0 or None, 60)
    digests = httpx.post(f"{url}/get_weights_checksum", json={}).json()
    assert digests == {name: module.sha256 for name, module in checksum(checkpoint(family)).items()}, (
        "every rank has the files' weights"
    )


@pytest.mark.parametrize(
    ("model", "sizes"),
    [("shapes", {"guidance_scale": 3.0}), ("shapes-video", {"guidance_scale": 3.0, "num_frames": 5})],
)
def test_an_embedded_model_whose_vocabulary_is_odd_is_served_by_two_ranks(model: str, sizes: dict[str, Any]) -> None:
    directory = resolve_model(model)
    assert isinstance(directory, Path)
    asked = {"prompt": "a small yellow star", "seed": 7, "width": 64, "height": 64, "num_inference_steps": 2, **sizes}
    asked |= {"output_format": "pt", "extra": {"max_sequence_length": 32}}
    with LiveServer(model, ["--threads", "1", "--tp", "2", "--dtype", "float32"]) as server:
        server.wait_ready()
        found = picture(ask(server.url, asked))
        said = httpx.get(f"{server.url}/model_info").json()["divided"]
        assert any("shared (dimension 0 of shared.weight is " in words for words in said.values())
        assert said["transformer"] == "divided among 2 ranks"
    assert (found - plain(load_plain(directory), asked)).abs().max() <= TOLERANCE


@pytest.fixture(scope="module")
def pair(checkpoint: Callable[[str], Path]) -> Iterator[LiveServer]:
    """A tiny FLUX on two ranks, which counts as hanging after three seconds."""
    flags = ["--threads", "1", "--tp", "2", "--stall-timeout-s", "3"]
    with LiveServer(checkpoint("flux"), flags) as server:
        server.wait_ready()
        yield server


def ranks(server: LiveServer) -> list[psutil.Process]:
    """The ranks' processes, the leader first."""
    found = [child for child in psutil.Process(server.pid).children() if child.name().startswith("sl-worker")]
    return sorted(found, key=lambda child: child.create_time())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_takes_its_replica_down_and_the_replica_comes_back(pair: LiveServer, rank: int) -> None:
    before = picture(ask(pair.url, body("flux")))
    killed = ranks(pair)
    with ThreadPoolExecutor() as pool:
        asked = body("flux", num_inference_steps=1000)
        running = pool.submit(httpx.post, f"{pair.url}/generate", json=asked, timeout=60)
        pair.wait_for(lambda: metric(pair.url, "safelight_running") == 1 or None, 10)
        killed[rank].kill()
        assert running.result().status_code == 503
    pair.wait_ready()
    assert not {process.pid for process in ranks(pair)} & {process.pid for process in killed}
    assert (picture(ask(pair.url, body("flux"))) == before).all()


def test_a_rank_that_hangs_is_found_and_its_replica_started_again(pair: LiveServer) -> None:
    stopped = ranks(pair)
    stopped[1].suspend()
    assert httpx.post(f"{pair.url}/generate", json=body("flux"), timeout=60).status_code == 503
    pair.wait_for(lambda: stopped[1].pid not in {process.pid for process in ranks(pair)} or None, 30)
    pair.wait_ready()
    assert picture(ask(pair.url, body("flux"))).ndim == 3


def test_sigterm_leaves_no_rank_behind(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with LiveServer(checkpoint("flux"), ["--threads", "1", "--tp", "2"], temporary=tmp_path) as server:
        server.wait_ready()
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        assert server.survivors() == []
    assert list(tmp_path.glob("safelight-*")) == []


@pytest.mark.parametrize(
    ("family", "degree", "sentence"),
    [
        (
            "flux",
            "3",
            "the transformer (FluxTransformer2DModel) cannot be divided among 3 ranks, "
            "because its num_attention_heads is 4; --tp can be 1, 2, 4.",
        ),
        (
            "pixart",
            "2",
            "there is no tensor-parallel plan for its transformer (PixArtTransformer2DModel); serve it with --tp 1.",
        ),
    ],
)
def test_a_degree_that_cannot_be_is_one_sentence(
    family: str, degree: str, sentence: str, checkpoint: Callable[[str], Path]
) -> None:
    ended = run("safelight.server.launch:main", [checkpoint(family), "--port", "0", "--threads", "1", "--tp", degree])
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].endswith(sentence)
