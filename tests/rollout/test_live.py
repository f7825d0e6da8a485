"""The contents of a rollout's reply, on live servers: filters, schedules, noise, versions, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
import torch
from safetensors.torch import load, save

from safelight.client import AsyncClient, Client
from safelight.client.rollout_calls import rollout
from safelight.client.rollouts import Rollout, decode_rollouts
from safelight.protocol.errors import Internal, InvalidRequest
from safelight.rollout.replay import steps_of
from safelight.server.unread import Unread
from safelight.tests.live import LiveServer
from safelight.tests.updates.trainer import Trainer, changed, transformer

from .test_recomputed import CLOSE, asked

STEPS = 4


@pytest.fixture(scope="module")
def server(checkpoint: Callable[[str], Path]) -> Iterator[LiveServer]:
    with LiveServer(checkpoint("flux"), ["--threads", "1"]) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def client(server: LiveServer) -> Client:
    return Client(server.url)


def latents(rollout: Rollout) -> torch.Tensor:
    assert rollout.trajectory is not None
    return rollout.trajectory.latents


def one(client: Client, **changes: Any) -> Rollout:
    (rollout,) = client.rollout(**asked("flux", **changes))
    return rollout


def same(one: Rollout, other: Rollout) -> bool:
    return bool(
        torch.equal(latents(one), latents(other))
        and torch.equal(one.output, other.output)
        and torch.equal(one.log_probs, other.log_probs)
    )


def test_the_reply_is_what_the_contract_says(server: LiveServer) -> None:
    body = {
        "prompt": "a red circle",
        "num_outputs_per_prompt": 2,
        "seed": 5,
        "num_inference_steps": STEPS,
        "width": 64,
        "height": 64,
        "rollout": True,
        "rollout_debug_mode": True,
        "rollout_return_denoising_env": True,
        "rollout_return_dit_trajectory": True,
    }
    answer = httpx.post(f"{server.url}/rollout/generate", json=body, timeout=60)
    assert answer.headers["content-type"] == "application/msgpack"
    reported = msgspec.msgpack.decode(answer.content)
    assert [one["seed"] for one in reported] == [5, 6]
    for sample in reported:
        tensor = sample["generated_output"]
        assert (tensor["__tensor__"], tensor["dtype"], tensor["shape"]) == (True, "torch.float32", [3, 64, 64])
        assert list(load(tensor["data"])["t"].shape) == [3, 64, 64]
        assert sample["rollout_log_probs"]["shape"] == [STEPS]
        path, debug = sample["dit_trajectory"], sample["rollout_debug_tensors"]
        latent = path["latents"]["shape"][1:]
        assert path["latents"]["shape"][0] == STEPS + 1
        assert path["timesteps"]["shape"] == path["sigmas"]["shape"] == [STEPS + 1]
        for name in ("variance_noises", "prev_sample_means", "model_outputs"):
            assert debug[f"rollout_{name}"]["shape"] == [STEPS, *latent]
        assert debug["rollout_noise_std_devs"]["shape"] == [STEPS, 1]
        assert sample["denoising_env"].keys() >= {"image_kwargs", "pos_cond_kwargs", "neg_cond_kwargs", "guidance"}
        assert (sample["sampler"], sample["log_prob_reduction"], sample["weight_version"]) == ("sde", "mean", "0")
        assert sample["prompt"] == "a red circle"
        assert sample["inference_time_s"] > 0
        assert sample["peak_memory_mb"] > 0
    as_msgpack = httpx.post(
        f"{server.url}/rollout/generate",
        content=msgspec.msgpack.encode(body),
        headers={"content-type": "application/msgpack"},
        timeout=60,
    )
    again = msgspec.msgpack.decode(as_msgpack.content)
    assert [one["seed"] for one in again] == [5, 6]


def test_a_sample_is_the_same_alone_and_in_company(client: Client) -> None:
    alone = one(client, deterministic=True)
    with ThreadPoolExecutor() as pool:
        asked_for = [{"seed": 3 + i, "prompt": prompt} for i, prompt in enumerate(["a star", "two", "a red circle"])]
        together = list(pool.map(lambda changes: one(client, deterministic=True, **changes), asked_for))
        merged = list(pool.map(lambda changes: one(client, **changes), asked_for))
    assert same(together[2], alone)
    assert not same(together[1], alone)
    assert (merged[2].log_probs - alone.log_probs).abs().max() < CLOSE
    assert (latents(merged[2]) - latents(alone)).norm() < CLOSE * latents(alone).norm()
    group = client.rollout(**asked("flux", deterministic=True, seed=4, n=2))
    assert same(group[1], alone)


def test_a_group_encodes_its_prompt_once(server: LiveServer, client: Client) -> None:
    def stats() -> dict[str, int]:
        (replica,) = client.info()["replicas"]
        reported: dict[str, int] = replica["stats"]
        return reported

    def settled() -> dict[str, int]:
        """The contents of several heartbeats in a row."""
        seen = [stats()]
        while len(seen) < 30 or seen[-30:] != [seen[-1]] * 30:
            time.sleep(0.1)
            seen.append({name: stats()[name] for name in ("running", "outputs", "forwards")})
        return seen[-1]

    def forwards_for(outputs: int, **changes: Any) -> int:
        before = settled()
        client.rollout(**asked("flux", deterministic=True, n=outputs, **changes))
        wanted = before["outputs"] + outputs
        after = server.wait_for(lambda: reported if (reported := stats())["outputs"] == wanted else None, 60)
        return after["forwards"] - before["forwards"]

    client.rollout(**asked("flux", deterministic=True, prompt="something"))
    encoders = 2  # of FLUX
    alone = forwards_for(1, prompt="something else")
    assert forwards_for(3, prompt="something else again") == 3 * (alone - encoders) + encoders


def test_an_ode_is_bitwise_what_generate_does_and_has_log_probability_zero(server: LiveServer, client: Client) -> None:
    rolled = one(client, sampler="ode", deterministic=True)
    plain = client.generate(
        "a red circle", steps=STEPS, seed=5, width=64, height=64, output_format="pt", deterministic=True
    )
    assert torch.equal(rolled.output, load(plain.outputs[0].data)["t"])
    assert torch.equal(rolled.log_probs, torch.zeros(STEPS))


def test_noise_only_where_it_is_asked_for(client: Client) -> None:
    path = one(client, deterministic=True, sde_steps=[1], debug=True)
    assert path.debug is not None
    assert (path.debug["rollout_noise_std_devs"][:, 0] > 0).tolist() == [False, True, False, False]
    assert (path.log_probs != 0).tolist() == [False, True, False, False]
    flat = one(client, deterministic=True, sampler="ode")
    assert torch.equal(latents(path)[0], latents(flat)[0])
    assert torch.allclose(latents(path)[1], latents(flat)[1], atol=1e-6)
    assert not torch.allclose(latents(path)[2], latents(flat)[2], atol=1e-2)


def test_only_the_requested_steps_are_returned(client: Client) -> None:
    """T steps have T + 1 latents; timesteps and sigmas are cut in the same way, and nothing else is."""
    whole = one(client, deterministic=True, debug=True)
    part = one(client, deterministic=True, debug=True, return_steps=[STEPS, 0, 2])
    assert part.trajectory is not None
    assert part.debug is not None
    assert whole.trajectory is not None
    assert whole.debug is not None
    assert part.trajectory.latent_indices == [0, 2, STEPS]
    for name in ("latents", "timesteps", "sigmas"):
        assert torch.equal(getattr(part.trajectory, name), getattr(whole.trajectory, name)[torch.tensor([0, 2, STEPS])])
    assert all(torch.equal(part.debug[name], whole.debug[name]) for name in whole.debug)
    assert torch.equal(part.log_probs, whole.log_probs)
    nothing = one(client, trajectory=False)
    assert (nothing.trajectory, nothing.debug) == (None, None)


def test_noises_and_means_make_the_next_state(client: Client) -> None:
    path = one(client, debug=True)
    assert path.debug is not None
    made = path.debug["rollout_prev_sample_means"] + (
        path.debug["rollout_noise_std_devs"][:, :, None] * path.debug["rollout_variance_noises"]
    )
    assert torch.allclose(made, latents(path)[1:], atol=1e-6)


def test_given_sigmas_and_noise_are_used_exactly(client: Client) -> None:
    sigmas = [1.0, 0.7, 0.2]
    noise = torch.randn(2, *latents(one(client)).shape[1:], generator=torch.Generator().manual_seed(0))
    paths = client.rollout(
        **asked("flux", steps=None, n=2, sigmas=sigmas, initial_noise=noise, deterministic=True, sampler="ode")
    )
    for path, row in zip(paths, noise, strict=True):
        assert path.trajectory is not None
        assert torch.equal(path.trajectory.sigmas, torch.tensor([*sigmas, 0.0]))
        assert torch.allclose(path.trajectory.timesteps, torch.tensor([1000.0, 700.0, 200.0, 0.0]))
        assert torch.equal(latents(path)[0], row)
    (shared,) = client.rollout(**asked("flux", seed=9, initial_noise=noise[1:], sampler="ode", deterministic=True))
    assert torch.equal(latents(shared)[0], noise[1])


def test_shared_memory_gives_the_same_and_nothing_is_left(server: LiveServer, client: Client) -> None:
    plain = one(client, deterministic=True, debug=True)
    shared = one(client, deterministic=True, debug=True, shared_memory=True)
    assert same(plain, shared)
    assert plain.debug is not None
    assert shared.debug is not None
    assert all(torch.equal(plain.debug[name], shared.debug[name]) for name in plain.debug)
    folder = Path(httpx.get(f"{server.url}/server_info").json()["shared_memory"])
    assert not list(folder.glob("rollout-*"))


def test_a_client_that_goes_away_leaves_nothing_in_shared_memory(checkpoint: Callable[[str], Path]) -> None:
    """Samples come one after the other here, so that some are there when it goes."""
    body = asked("flux", n=16, steps=8, shared_memory=True)
    with LiveServer(checkpoint("flux"), ["--threads", "1", "--batching", "serial"]) as server:
        server.wait_ready()
        reported = httpx.get(f"{server.url}/server_info").json()
        folder = Path(reported["shared_memory"])
        call, place = rollout(**body), urlsplit(server.url)
        with socket.create_connection((place.hostname, place.port)) as connection:
            content = json.dumps(call.body).encode()
            head = f"POST {call.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            server.wait_for(lambda: len(list(folder.glob("rollout-*"))) > 1 or None, 60)
        server.wait_for(lambda: not list(folder.glob("rollout-*")) or None, 60)
        time.sleep(0.5)
        assert not list(folder.glob("rollout-*"))


def test_what_is_not_fetched_is_swept_away(tmp_path: Path) -> None:
    names = ("rollout-1.safetensors", "rollout-2.safetensors", "adapter-1.safetensors")
    for name in names:
        (tmp_path / name).touch()
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (0, 0))
    Unread(tmp_path, 1 << 30).sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-1.safetensors", "rollout-2.safetensors"]


@pytest.mark.parametrize("level", [1e-25, 1e-30])
def test_noise_that_is_lost_in_fp32_is_none(level: float, client: Client) -> None:
    for sampler in ("sde", "cps"):
        path = one(client, sampler=sampler, noise_level=level, no_const=False)
        assert torch.equal(path.log_probs, torch.zeros(STEPS))


def test_a_file_that_a_reply_names_is_neither_read_nor_removed_unless_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "safelight-x" / "rollout-0123456789abcdef.safetensors"
    file.parent.mkdir()
    other = tmp_path / "checkpoint.safetensors"
    for path, shared in ((file, False), (other, True)):
        path.write_bytes(save({"0": torch.zeros(1)}))
        reply = msgspec.msgpack.encode([{"generated_output": {"__tensor__": True, "file": str(path), "name": "0"}}])
        with pytest.raises(Internal, match="not a file that the call requested"):
            decode_rollouts(reply, "here", shared=shared)
        assert path.exists()


def test_a_rollout_names_the_versions_that_it_spans(
    checkpoint: Callable[[str], Path], server: LiveServer, client: Client
) -> None:
    trainer = Trainer(server, checkpoint("flux"))
    own = transformer(checkpoint("flux"))
    before = one(client).weight_version
    with ThreadPoolExecutor() as pool:
        running = pool.submit(lambda: one(client, steps=400))
        server.wait_for(lambda: client.info()["replicas"][0]["stats"]["running"] == 1 or None, 20)
        reported = trainer.update(changed(own), mode="in_place")
        spanning = running.result()
    new = reported["weight_version"]
    assert spanning.weight_versions == [before, new]
    assert spanning.weight_version == new
    steps = spanning.step_weight_versions
    old = steps_of(before, [steps])
    assert 0 < len(old) < 400, "the update came under it"
    assert (old, steps_of(new, [steps])) == (list(range(len(old))), list(range(len(old), 400)))
    after = one(client)
    assert (after.weight_versions, after.step_weight_versions) == ([new], [new] * STEPS)
    trainer.restore()


def test_a_generation_without_a_rollout_is_what_generate_draws_in_a_rollout_s_reply(
    server: LiveServer, client: Client
) -> None:
    body = {"prompt": "a red circle", "num_inference_steps": STEPS, "width": 64, "height": 64, "seed": 5,
            "deterministic": True, "rollout": False, "rollout_return_dit_trajectory": True}  # fmt: skip
    answer = httpx.post(f"{server.url}/rollout/generate", json=body, timeout=60)
    (reported,) = msgspec.msgpack.decode(answer.content)
    plain = client.generate(
        "a red circle", steps=STEPS, seed=5, width=64, height=64, output_format="pt", deterministic=True
    )
    assert torch.equal(load(reported["generated_output"]["data"])["t"], load(plain.outputs[0].data)["t"])
    names = ("rollout_log_probs", "rollout_debug_tensors", "denoising_env", "dit_trajectory")
    assert [reported[name] for name in names] == [None] * 4
    assert torch.equal(one(client, deterministic=True, recorded=False).output, load(plain.outputs[0].data)["t"])


def test_outputs_have_the_dtype_that_is_asked_for(client: Client) -> None:
    whole = one(client, deterministic=True, sampler="ode").output
    quantised = one(client, deterministic=True, sampler="ode", output_dtype="uint8").output
    assert quantised.dtype == torch.uint8
    assert torch.equal(quantised, (whole.clamp(0, 1) * 255).round().to(torch.uint8))
    for name in ("float16", "bfloat16", "float32"):
        found = one(client, deterministic=True, sampler="ode", output_dtype=name).output
        assert torch.equal(found, whole.to(getattr(torch, name)))


def test_seeds_of_the_steps_change_their_noise_and_not_the_first(client: Client) -> None:
    keys = ["a", "b", "a"]
    group = client.rollout(**asked("flux", deterministic=True, n=3, seed=5, debug=True, denoise_seeds=keys))
    noises = [path.debug["rollout_variance_noises"] for path in group if path.debug is not None]
    assert torch.equal(noises[0], noises[2])
    assert not torch.equal(noises[0], noises[1])
    assert torch.equal(latents(group[1])[0], latents(one(client, deterministic=True, seed=6))[0])
    for step in range(STEPS):
        text = f"5::step::{step}::sample::b".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % (2**63 - 1)
        drawn = torch.randn(1, *noises[1].shape[1:], generator=torch.Generator().manual_seed(seed))
        assert torch.equal(noises[1][step], drawn[0])


def test_what_both_branches_share_is_in_each_and_only_input_images_are_apart(client: Client) -> None:
    environment = one(client).environment
    assert environment is not None
    assert environment["image_kwargs"] == {}
    assert environment["pos_cond_kwargs"].keys() >= {
        "img_ids",
        "txt_ids",
        "encoder_hidden_states",
        "pooled_projections",
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "seeds for more samples": ({"denoise_seeds": ["a", "b"]}, "denoise_seeds"),
    "another dtype": ({"rollout_video_dtype": "int32"}, "rollout_video_dtype"),
    "latents behind the last": ({"rollout_return_step_indices": [STEPS + 1]}, "rollout_return_step_indices"),
    "a schedule that has its own shift": ({"extra_sampling_params": {"flow_shift": -1.0}}, "flow_shift"),
    "a picture elsewhere": ({"image_path": ["/etc/passwd"]}, "image_path"),
    "a picture that is not there": ({"image_path": ["nothing.png"]}, "image_path"),
    "an unknown sampler": ({"rollout_sde_type": "ddim"}, "rollout_sde_type"),
    "too much noise": ({"rollout_sde_type": "cps", "rollout_noise_level": 1.5}, "rollout_noise_level"),
    "a negative step": ({"rollout_sde_step_indices": [-1]}, "rollout_sde_step_indices"),
    "a step twice": ({"rollout_return_step_indices": [1, 1]}, "rollout_return_step_indices"),
    "a step that is not there": ({"rollout_sde_step_indices": [STEPS]}, "rollout_sde_step_indices"),
    "sigmas that rise": ({"sigmas": [0.5, 0.7], "num_inference_steps": None}, "sigmas"),
    "sigmas above one": ({"sigmas": [2.0, 0.7], "num_inference_steps": None}, "sigmas"),
    "no sigmas": ({"sigmas": [], "num_inference_steps": None}, "sigmas"),
    "other steps than sigmas": ({"sigmas": [0.9, 0.7]}, "num_inference_steps"),
    "noise of another dtype": ({"initial_noise": save({"t": torch.zeros(1, 16, 16).half()})}, "initial_noise"),
    "noise for more samples": ({"initial_noise": save({"t": torch.zeros(3, 16, 16)})}, "initial_noise"),
    "noise of another shape": ({"initial_noise": save({"t": torch.zeros(1, 5, 7)})}, "initial_noise"),
    "noise of a larger picture": ({"initial_noise": save({"t": torch.zeros(1, 64, 16)})}, "initial_noise"),
    "noise without end": ({"initial_noise": save({"t": torch.full((1, 16, 16), 1e38)})}, "initial_noise"),
    "noise that is not a number": ({"initial_noise": save({"t": torch.full((1, 16, 16), math.nan)})}, "initial_noise"),
    "sigmas that are one in fp32": ({"sigmas": [1.0, 0.99999999999, 0.5], "num_inference_steps": None}, "sigmas"),
    "a sigma that underflows in fp32": ({"sigmas": [1.0, 1e-46], "num_inference_steps": None}, "sigmas"),
    "a schedule by another way": ({"extra": {"sigmas": [0.9, 0.3, 0.5]}}, "extra.sigmas"),
    "many sigmas": ({"sigmas": [0.5] * 5000, "num_inference_steps": None}, "sigmas"),
    "invalid noise": ({"initial_noise": b"nothing"}, "initial_noise"),
    "a GPU that is not there": ({"generator_device": "cuda"}, "generator_device"),
    "a step cache": ({"cache": "fast"}, "cache"),
    "a stream": ({"stream": True}, "stream"),
    "a picture's format": ({"output_format": "png"}, "output_format"),
    "an unknown field": ({"rollout_sde": "sde"}, "rollout_sde"),
    "an argument in two places": ({"extra": {"a": 1}, "extra_sampling_params": {"a": 2}}, "a"),
    "a field in two places": ({"extra_sampling_params": {"width": 32}}, "width"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rolled_out_is_a_400_that_names_it(case: str, server: LiveServer) -> None:
    changes, field = REFUSED[case]
    body = {"prompt": "a star", "num_inference_steps": STEPS, "width": 64, "height": 64} | changes
    if isinstance(body.get("initial_noise"), bytes):
        body["initial_noise"] = {"__tensor__": True, "data": base64.b64encode(body["initial_noise"]).decode()}
    body = {name: value for name, value in body.items() if value is not None}
    answer = httpx.post(f"{server.url}/rollout/generate", json=body, timeout=60)
    assert answer.status_code in (400, 403, 404, 422), answer.text
    assert answer.json()["error"]["field"] == field, answer.text


def test_a_model_without_a_flow_is_refused_in_words(checkpoint: Callable[[str], Path]) -> None:
    with LiveServer(checkpoint("sd15"), ["--threads", "1"]) as running:
        running.wait_ready()
        with pytest.raises(InvalidRequest, match="does not follow a flow"):
            Client(running.url).rollout("a star", width=64, height=64)


def test_the_async_client_does_the_same(server: LiveServer, client: Client) -> None:
    async def roll_out() -> Rollout:
        async with AsyncClient(server.url) as asynchronous:
            with pytest.raises(InvalidRequest, match="rollout_noise_level"):
                await asynchronous.rollout("a star", noise_level=-1)
            (found,) = await asynchronous.rollout(**asked("flux", deterministic=True))
            return found

    assert same(asyncio.run(roll_out()), one(client, deterministic=True))
