"""The requests of today's trainers, in their order and with all fields: one sequence per trainer, on one server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from safetensors.torch import load, save

from safelight.tests.live import LiveServer
from safelight.tests.updates.test_groups import free_port
from safelight.tests.updates.trainer import Trainer, changed, transformer
from safelight.tests.updates.training import TrainingProcess
from safelight.tests.worker.weights import trainer as sending

STEPS = 4
PICTURE = {"width": 64, "height": 64, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def server(checkpoint: Callable[[str], Path]) -> Iterator[LiveServer]:
    with LiveServer(checkpoint("flux"), ["--threads", "1"]) as running:
        yield running.wait_ready()


@pytest.fixture
def trainer(server: LiveServer, checkpoint: Callable[[str], Path]) -> Iterator[Trainer]:
    found = Trainer(server, checkpoint("flux"))
    yield found
    found.restore()


def get(trainer: Trainer, path: str) -> dict[str, Any]:
    answer = httpx.get(f"{trainer.server.url}{path}", timeout=60)
    assert answer.status_code == 200, answer.text
    reported: dict[str, Any] = answer.json()
    return reported


def rolled(trainer: Trainer, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = trainer.post("/rollout/generate", body)
    assert answer.status_code == 200, answer.text
    reported: list[dict[str, Any]] = msgspec.msgpack.decode(answer.content)
    return reported


def tensor(reported: dict[str, Any]) -> torch.Tensor:
    return load(reported["data"])["t"]


def digest(one: torch.Tensor) -> str:
    data = one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(str(one.dtype).encode() + repr(tuple(one.shape)).encode() + data).hexdigest()


def test_miles_for_diffusion_rolls_out_evaluates_and_sends_weights(trainer: Trainer) -> None:
    """``build_rollout_sampling_params`` and the engine's calls of miles-diffusion."""
    get(trainer, "/health_generate")
    common = PICTURE | {"generator_device": None, "guidance_scale": 1.0, "true_cfg_scale": None, "seed": 40}
    train = common | {
        "rollout": True, "rollout_sde_type": "sde", "rollout_noise_level": 0.7, "rollout_log_prob_no_const": False,
        "rollout_debug_mode": None, "rollout_video_dtype": "uint8", "rollout_return_denoising_env": True,
        "rollout_return_dit_trajectory": True, "rollout_sde_step_indices": [1, 2],
        "rollout_return_step_indices": [1, 2, 3], "suppress_logs": True, "image_path": None,
        "extra_sampling_params": None, "prompt": "a red circle", "num_outputs_per_prompt": 2,
    }  # fmt: skip
    group = rolled(trainer, train)
    assert [one["seed"] for one in group] == [40, 41]
    for one in group:
        assert one["generated_output"]["dtype"] == "torch.uint8"
        assert (tensor(one["rollout_log_probs"]) != 0).tolist() == [False, True, True, False]
        path = one["dit_trajectory"]
        assert [path[name]["shape"][0] for name in ("latents", "timesteps", "sigmas")] == [3, 3, 3]
        assert torch.equal(tensor(path["timesteps"]), tensor(path["sigmas"]) * 1000)
        assert one["denoising_env"]["pos_cond_kwargs"].keys() >= {"encoder_hidden_states", "img_ids", "txt_ids"}
        assert one["denoising_env"]["image_kwargs"] == {}
    (evaluated,) = rolled(
        trainer, common | {"rollout": False, "prompt": "a star", "num_outputs_per_prompt": 1, "image_path": None}
    )
    assert (evaluated["rollout_log_probs"], evaluated["generated_output"]["dtype"]) == (None, "torch.float32")
    new = changed(transformer(trainer.directory), 0.25)
    trainer.done("/release_memory_occupation", {"tags": ["transformer"], "cpu_backup_tags": ["transformer"]})
    assert trainer.post("/generate", {"prompt": "a star"}).status_code == 409
    assert trainer.done("/resume_memory_occupation", {"tags": None})["sleeping"] is False
    with sending.Trainer() as sender:
        file = trainer.directory / "transformer" / "diffusion_pytorch_model.safetensors"
        payload = sender.checkpoint(file, "elements", by=0.25)
        trainer.done(
            "/update_weights_from_tensor",
            {"serialized_named_tensors": [payload], "load_format": "flattened_bucket",
             "target_modules": ["transformer"],
             "weight_update_mode": None, "lora_alpha": None, "lora_rank": None, "weight_version": "40"},
        )  # fmt: skip
    expected = {name: digest(one) for name, one in new.items()}
    trainer.done("/update_weights_from_tensor_checker", {"expected_transformer_sha256": [expected, expected]})
    wrong = {**expected, next(iter(expected)): "0" * 64}
    for maps in ([expected, wrong], wrong):
        answer = trainer.post("/update_weights_from_tensor_checker", {"expected_transformer_sha256": maps})
        assert answer.status_code == 400, answer.text
    assert rolled(trainer, train)[0]["weight_version"] == "40"


def test_unirl_gives_sigmas_noise_and_seeds_of_its_own(trainer: Trainer) -> None:
    """``ImageAdapter.build_inputs`` of UniRL: the driver has the schedule, the first noise and the steps' noise."""
    sigmas, level = [1.0, 0.75, 0.4], 0.3
    latents = torch.randn(2, *_latents(trainer), generator=torch.Generator().manual_seed(0))
    body = {
        "prompt": ["a red circle", "a star"], "sigmas": sigmas, "seed": 7, "guidance_scale": 1.0, "width": 64,
        "height": 64, "num_inference_steps": 3, "denoise_seeds": ["p0:0", "p1:0"], "rollout": True,
        "rollout_sde_type": "dance", "rollout_noise_level": level, "rollout_sde_step_indices": [0, 1],
        "rollout_return_dit_trajectory": True, "rollout_debug_mode": True,
        "initial_noise": {"__tensor__": True, "data": save({"t": latents})},
    }  # fmt: skip
    answer = httpx.post(
        f"{trainer.server.url}/rollout/generate",
        content=msgspec.msgpack.encode(body),
        headers={"content-type": "application/msgpack"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    for i, one in enumerate(msgspec.msgpack.decode(answer.content)):
        path, debug = tensor(one["dit_trajectory"]["latents"]), one["rollout_debug_tensors"]
        assert torch.equal(path[0], latents[i])
        schedule = [*sigmas, 0.0]
        for step in range(3):
            dt, x = schedule[step + 1] - schedule[step], path[step].double()
            v = tensor(debug["rollout_model_outputs"])[step].double()
            std = level * (-dt) ** 0.5 if step < 2 else 0.0
            clean = x - schedule[step] * v
            score = -(x - clean * (1 - schedule[step])) / schedule[step] ** 2
            mean = x + dt * v - (0.5 * level**2 * score * dt if step < 2 else 0.0)
            text = f"7::step::{step}::sample::{body['denoise_seeds'][i]}".encode()
            seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % (2**63 - 1)
            noise = torch.randn(1, *x.shape, generator=torch.Generator().manual_seed(seed))[0]
            assert (path[step + 1] - (mean + std * noise)).abs().max() < 1e-5


def _latents(trainer: Trainer) -> list[int]:
    body = PICTURE | {"prompt": "a", "num_inference_steps": 1, "rollout_return_dit_trajectory": True}
    (one,) = rolled(trainer, body)
    shape: list[int] = one["dit_trajectory"]["latents"]["shape"][1:]
    return shape


def test_slime_pauses_flushes_broadcasts_and_names_the_version(
    trainer: Trainer, checkpoint: Callable[[str], Path]
) -> None:
    """The calls of slime's and miles' engines around an update over a process group."""
    for path in ("/get_server_info", "/get_model_info", "/model_info"):
        get(trainer, path)
    assert get(trainer, "/get_server_info").keys() == get(trainer, "/server_info").keys()
    trainer.done("/weights_checker", {"action": "snapshot"})
    trainer.done("/pause_generation", {"mode": "retract"})
    assert get(trainer, "/flush_cache")["success"]
    trainer.done("/release_memory_occupation", {"tags": None})
    trainer.done("/resume_memory_occupation", {"tags": ["weights"]})
    trainer.done("/weights_checker", {"action": "reset_tensors"})
    with TrainingProcess(checkpoint("flux")) as training:
        group = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 2,
                 "group_name": "slime-pp_0", "backend": "gloo"}  # fmt: skip
        training.send("join", port=group["master_port"], world_size=2, group=group["group_name"])
        trainer.done("/init_weights_update_group", group)
        training.answer()
        training.do("step")
        announced = training.do("announced")
        announced |= {"dtypes": [one.removeprefix("torch.") for one in announced["dtypes"]]}
        body = announced | {"group_name": group["group_name"], "flush_cache": False, "weight_version": "3"}
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(trainer.done, "/update_weights_from_distributed", body)
            training.send("broadcast", group=group["group_name"], tensors=10_000)
            assert answer.result()["weight_version"] == "3"
            training.answer()
        post = {"restore_weights_before_load": False, "post_process_quantization": True}
        trainer.done("/post_process_weights", post)
        trainer.done("/resume_memory_occupation", {"tags": ["kv_cache", "cuda_graph"]})
        differs = trainer.post("/weights_checker", {"action": "compare"})
        assert differs.status_code == 400, differs.text
        assert differs.json()["mismatched"]
        trainer.done("/update_weight_version", {"new_version": "4", "abort_all_requests": False})
        assert get(trainer, "/get_weight_version") == {"weight_version": "4"}
        trainer.done("/continue_generation", {})
        assert trainer.draw()["weight_version"] == "4"
        trainer.done("/destroy_weights_update_group", {"group_name": group["group_name"]})
        training.do("leave", group=group["group_name"])
    trainer.restore()
    trainer.done("/weights_checker", {"action": "compare"})
    assert trainer.done("/abort_request", {"rid": "", "abort_all": True})["success"]


def test_the_four_phases_of_vllm_are_one_transaction(trainer: Trainer, checkpoint: Callable[[str], Path]) -> None:
    before = trainer.checksum()
    members = get(trainer, "/get_world_size")["world_size"]
    with TrainingProcess(checkpoint("flux")) as training:
        info = {"master_address": "127.0.0.1", "master_port": free_port(), "rank_offset": 1, "world_size": 1 + members}
        training.send("join", port=info["master_port"], world_size=info["world_size"], group="weight_transfer")
        trainer.done("/init_weight_transfer_engine", {"init_info": info})
        training.answer()
        training.do("step")
        announced = training.do("announced")
        update = {
            "names": announced["names"],
            "dtype_names": [one.removeprefix("torch.") for one in announced["dtypes"]],
            "shapes": announced["shapes"],
            "packed": False,
        }
        assert get(trainer, "/is_paused") == {"is_paused": False}
        trainer.done("/pause?mode=keep")
        assert get(trainer, "/is_paused") == {"is_paused": True}
        trainer.done("/start_weight_update", {"is_checkpoint_format": True})
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(trainer.done, "/update_weights", {"update_info": update})
            training.send("broadcast", group="weight_transfer", tensors=10_000)
            answer.result()
            training.answer()
        assert get(trainer, "/get_weight_version")["weight_version"] != "9", "it is not committed"
        reported = trainer.done("/finish_weight_update", {"weight_version": "9"})
        assert reported["weight_version"] == "9"
        trainer.done("/resume")
        assert trainer.draw()["weight_version"] == "9"
        trainer.done("/update_weights_from_tensor_checker", {"expected_named_tensors_sha256": training.do("digests")})
        assert trainer.post("/finish_weight_update").status_code == 409
        packed = trainer.post("/update_weights", {"update_info": {**update, "packed": True}})
        assert (packed.status_code, packed.json()["error"]["field"]) == (400, "packed")
    assert trainer.checksum() != before


def test_a_tag_is_a_module_or_a_cache_and_another_is_named(trainer: Trainer) -> None:
    before = trainer.checksum()
    reported = trainer.done("/release_memory_occupation", {"tags": ["vae", "text_encoder"]})
    assert reported["sleeping"]
    assert trainer.done("/resume_memory_occupation", {"tags": ["vae"]})["sleeping"], "the other one still does"
    assert not trainer.done("/resume_memory_occupation", {"tags": ["weights"]})["sleeping"]
    assert trainer.checksum() == before
    trainer.draw()
    for path in ("/release_memory_occupation", "/resume_memory_occupation"):
        answer = trainer.post(path, {"tags": ["unet"]})
        assert (answer.status_code, answer.json()["error"]["field"]) == (400, "tags")
