"""A trainer with only the denoiser recomputes the server's log-probabilities from the rollout."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from safelight.client import Client
from safelight.client.rollouts import Rollout
from safelight.rollout.replay import log_probs
from safelight.tests.effort import chosen
from safelight.tests.serving import Servers, by_family
from safelight.tests.tiny import FAMILIES

CLOSE = 1e-5
"""The effect of rounding on an unguided prediction; guidance multiplies it by up to its scale."""
BATCHED = 2e-4
"""The tolerance for samples replayed in one call: guidance multiplies their rounding, a small deviation divides it."""
NAMES = chosen("flux", "sd3", "zimage", "wan22", nightly=["qwenimage", "wan", "sana", "ltx"])
STEPS = 4
GUIDED = {
    "sd3": {"guidance_scale": 5.0},
    "qwenimage": {"true_cfg_scale": 3.0},
    "zimage": {"guidance_scale": 4.0},
    "wan": {"guidance_scale": 5.0},
    "wan22": {"guidance_scale": 5.0},
    "sana": {"guidance_scale": 4.5},
    "ltx": {"guidance_scale": 3.0},
}
"""How each is asked for two answers of its denoiser; FLUX has one."""


def asked(name: str, **changes: Any) -> dict[str, Any]:
    sizes = {key: FAMILIES[name].call[key] for key in ("width", "height", "num_frames") if key in FAMILIES[name].call}
    guided = GUIDED.get(name, {})
    negative = {"negative_prompt": "a blue square"} if guided else {}  # as many words as the prompt
    own = {"prompt": "a red circle", "steps": STEPS, "seed": 5, "environment": True}
    return own | sizes | guided | negative | changes


def close(name: str) -> float:
    return CLOSE * max(GUIDED.get(name, {"": 1.0}).values())


def denoisers(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    pipeline = DiffusionPipeline.from_pretrained(path, torch_dtype=dtype)
    return {name: part for name, part in pipeline.components.items() if name.startswith("transformer")}


@torch.no_grad()
def difference(*rollouts: Rollout, modules: dict[str, Any], sampler: Any = "sde", noise_level: float = 0.7) -> float:
    """The largest between the server's log-probabilities and those recomputed in one call, of steps with noise."""
    environments = [one.environment for one in rollouts]
    trajectories = [one.trajectory for one in rollouts]
    noisy = range(STEPS - 1) if sampler == "cps" else range(STEPS)
    reported = torch.stack([one.log_probs[: len(noisy)] for one in rollouts])
    got = log_probs(modules, environments, trajectories, noisy, sampler, noise_level)
    assert reported.abs().min() > 0
    return float((got - reported).abs().max())


@pytest.mark.parametrize("name", by_family(*NAMES))
def test_log_probabilities_are_recomputed_exactly(
    name: str, checkpoint: Callable[[str], Path], servers: Servers
) -> None:
    path = checkpoint(name)
    torch.set_num_threads(1)
    modules = denoisers(path)
    client = Client(servers(name).url)
    for sampler, level in (("sde", 0.7), ("cps", 0.5)):
        two = ["a red circle", "a red square"]  # of as many words, so that they can be in one call
        exact = client.rollout(**asked(name, prompt=two, sampler=sampler, noise_level=level, deterministic=True))
        assert [difference(one, modules=modules, sampler=sampler, noise_level=level) for one in exact] == [0, 0]
        assert difference(*exact, modules=modules, sampler=sampler, noise_level=level) < BATCHED
    if name in GUIDED:
        assert exact[0].environment is not None
        assert exact[0].environment["neg_cond_kwargs"]
        assert set(exact[0].environment["guidance"]["scale"]) == set(GUIDED[name].values())
    prompts = ["a red circle", "a blue square with a hole", "a star"]
    with ThreadPoolExecutor() as pool:
        batches = list(pool.map(lambda prompt: client.rollout(**asked(name, prompt=prompt, n=2)), prompts))
    for batch in batches:
        assert [difference(one, modules=modules) < close(name) for one in batch] == [True, True]


@pytest.mark.parametrize("name", by_family(*chosen("flux", "zimage", nightly=["qwenimage", "sana", "ltx"])))
def test_log_probabilities_of_a_model_in_bfloat16_are_recomputed(
    name: str, checkpoint: Callable[[str], Path], servers: Servers
) -> None:
    """States and sums are in fp32 all the same; some pipelines put answers together in fp32, and some do not."""
    path = checkpoint(name)
    torch.set_num_threads(1)
    modules = denoisers(path, torch.bfloat16)
    client = Client(servers(name, "--dtype", "bfloat16").url)
    (rollout,) = client.rollout(**asked(name, deterministic=True))
    assert rollout.trajectory is not None
    assert rollout.trajectory.latents.dtype == torch.float32
    assert difference(rollout, modules=modules) == 0


@pytest.mark.xdist_group("hunyuan_video15")
def test_what_cannot_be_made_again_has_no_replay(servers: Servers) -> None:
    """Its guiders call the denoiser in ways of their own."""
    (rollout,) = Client(servers("hunyuan_video15").url).rollout(**asked("hunyuan_video15"))
    assert rollout.environment is not None
    assert rollout.environment["replay"] is None
    assert rollout.environment["pos_cond_kwargs"]
    assert rollout.log_probs.isfinite().all()


def on_two_ranks(name: str, *flags: str) -> Any:
    return pytest.param(name, flags, marks=pytest.mark.xdist_group(name), id="-".join((name, *flags)))


@pytest.mark.parametrize(
    ("name", "flags"),
    [on_two_ranks(name, "--tp", "2") for name in chosen("flux", nightly=["wan", "sd3", "qwenimage", "zimage"])]
    + [on_two_ranks(name, "--ulysses", "2") for name in chosen(nightly=["flux", "wan", "qwenimage"])]
    + [on_two_ranks(name, "--cfg-parallel") for name in chosen(nightly=["sd3", "wan", "zimage"])],
)
def test_log_probabilities_of_two_ranks_are_recomputed(
    name: str, flags: tuple[str, ...], checkpoint: Callable[[str], Path], servers: Servers
) -> None:
    modules = denoisers(checkpoint(name))
    for rollout in Client(servers(name, *flags).url).rollout(**asked(name, n=4)):
        assert difference(rollout, modules=modules) < close(name)
