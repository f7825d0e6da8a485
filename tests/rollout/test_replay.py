"""Samples that cannot be replayed in one call are refused, not mixed up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from safelight.client.rollouts import Trajectory
from safelight.rollout.replay import log_probs, steps_of, velocity


class Denoiser(nn.Module):
    """Returns its arguments: latents times the condition, plus the time."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, latents: torch.Tensor, t: torch.Tensor, own: torch.Tensor, ids: Any, **_: Any) -> Any:
        return (latents * own.mean((1, 2))[:, None] + t[:, None],)


MODULES = {"transformer": Denoiser()}


def environment(own: float, *, length: int = 2, **changes: Any) -> dict[str, Any]:
    replay = {
        "components": ["transformer"] * 2,
        "latents": "latents",
        "shape": [3],
        "listed": False,
        "timestep": "t",
        "timesteps": torch.tensor([1.0, 0.5]),
        "joined": None,
        "shared": [],
    }
    conditions = {"own": torch.full((1, length, 4), own), "ids": torch.arange(length)}
    guidance = {"rule": "none", "scale": [1.0, 1.0], "sign": 1, "widened": False}
    reported = {"image_kwargs": {}, "pos_cond_kwargs": conditions, "neg_cond_kwargs": None, "guidance": guidance}
    return reported | {"replay": replay} | changes


def trajectory(sigmas: tuple[float, ...] = (1.0, 0.5, 0.0)) -> Trajectory:
    return Trajectory(torch.randn(3, 3), [0, 1, 2], torch.zeros(3), torch.tensor(sigmas))


def test_each_sample_of_a_call_has_its_own_condition() -> None:
    x = torch.randn(3, 3)
    own = [2.0, 3.0, 5.0]
    got = velocity(MODULES, [environment(one) for one in own], x, 1)
    assert torch.equal(got, x * torch.tensor(own)[:, None] + 0.5)


def test_negative_answers_stay_with_their_samples() -> None:
    negative = {"own": torch.full((1, 2, 4), 1.0), "ids": torch.arange(2)}
    guidance = {"rule": "from_negative", "scale": [4.0, 4.0], "sign": -1, "widened": False}
    x = torch.randn(2, 3)
    for joined in (None, "positive_first", "negative_first"):
        reported = [environment(own, neg_cond_kwargs=negative, guidance=guidance) for own in (2.0, 3.0)]
        shared = [] if joined is None else ["ids"]
        reported = [one | {"replay": one["replay"] | {"joined": joined, "shared": shared}} for one in reported]
        got = velocity(MODULES, reported, x, 0)
        wanted = torch.stack([-(row + 1 + 4 * (row * own - row)) for row, own in zip(x, (2.0, 3.0), strict=True)])
        assert torch.allclose(got, wanted, atol=1e-6), joined


def test_what_all_rows_of_a_joined_call_share_is_given_once() -> None:
    """Also what has one row itself, and would look like a row of each."""

    class Once(Denoiser):
        def forward(self, latents: torch.Tensor, t: torch.Tensor, own: torch.Tensor, ids: Any, **_: Any) -> Any:
            assert ids.shape == (1, 5)
            return super().forward(latents, t, own, ids)

    ids = torch.zeros(1, 5)
    guidance = {"rule": "from_negative", "scale": [4.0, 4.0], "sign": 1, "widened": False}
    own = [{"own": torch.full((1, 2, 4), value), "ids": ids} for value in (2.0, 1.0)]
    reported = environment(2.0, pos_cond_kwargs=own[0], neg_cond_kwargs=own[1], guidance=guidance)
    reported |= {"replay": reported["replay"] | {"joined": "negative_first", "shared": ["ids"]}}
    x = torch.randn(1, 3)
    assert torch.allclose(velocity({"transformer": Once()}, [reported], x, 0), x + 1 + 4 * x, atol=1e-6)


def test_a_cut_trajectory_has_the_log_probabilities_of_the_steps_that_it_holds() -> None:
    whole = trajectory()
    cut = Trajectory(whole.latents[1:], [1, 2], whole.timesteps[1:], whole.sigmas[1:])
    wanted = log_probs(MODULES, [environment(1.0)], [whole], [1], "dance", 0.7)
    assert torch.equal(log_probs(MODULES, [environment(1.0)], [cut], [1], "dance", 0.7), wanted)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": (environment(1.0, length=3), "own has different lengths"),
    "guidance": (
        environment(1.0, guidance={"rule": "none", "scale": [2.0, 1.0], "sign": 1, "widened": False}),
        "guidance",
    ),
    "arguments": (environment(1.0, pos_cond_kwargs={"own": torch.ones(1, 2, 4)}), "different arguments"),
    "what is shared": (
        environment(1.0, pos_cond_kwargs={"own": torch.ones(1, 2, 4), "ids": torch.tensor([0, 2])}),
        "ids differs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_samples_that_cannot_be_in_one_call_are_refused(case: str) -> None:
    other, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        velocity(MODULES, [environment(1.0), other], torch.randn(2, 3), 0)


def test_what_does_not_belong_together_is_refused() -> None:
    reported = environment(1.0)
    with pytest.raises(ValueError, match="2 states have 1 environments"):
        log_probs(MODULES, [reported], [trajectory(), trajectory()], [0], "sde", 0.7)
    with pytest.raises(ValueError, match="several schedules"):
        log_probs(MODULES, [reported, reported], [trajectory(), trajectory((1.0, 0.4, 0.0))], [0], "sde", 0.7)
    with pytest.raises(ValueError, match="cannot be made again"):
        velocity(MODULES, [reported | {"replay": None}], torch.randn(1, 3), 0)


def test_steps_of_a_version_are_those_that_it_made_alone_in_every_sample() -> None:
    assert steps_of("2", [["1", "2", "2", None], ["1", "1", "2", "2"]]) == [2]


UNSAID: dict[str, tuple[dict[str, Any], str]] = {
    "no environment": ({"environments": [None]}, "environment=True"),
    "no trajectory": ({"trajectories": [None]}, "trajectory=True"),
    "nothing": ({"environments": [], "trajectories": []}, "no rollouts"),
    "one of them": ({"trajectories": [trajectory(), trajectory()]}, "2 states have 1 environment"),
    "another component": ({"denoisers": {"transformer_2": Denoiser()}}, "denoiser transformer;.*are transformer_2"),
    "no noise": ({"sampler": "ode"}, "'ode'"),
    "a level of zero": ({"noise_level": 0.0}, "noise_level is 0"),
    "a step without noise": ({"sampler": "cps", "steps": [1]}, "step 1 has no noise"),
    "a step behind the last": ({"steps": [2]}, "no step 2; .* steps 0 to 1"),
    "a step before the first": ({"steps": [-1]}, "no step -1"),
    "latents that were not returned": (
        {"trajectories": [Trajectory(torch.randn(1, 3), [1], torch.zeros(1), torch.tensor([0.5]))]},
        r"latents at \[1\], not at 0; ask for them with return_steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAID)
def test_no_trainer_meets_an_error_that_does_not_say_what_its_rollouts_lack(case: str) -> None:
    changes, message = UNSAID[case]
    given = {"denoisers": MODULES, "environments": [environment(1.0)], "trajectories": [trajectory()], "steps": [0]}
    with pytest.raises(ValueError, match=message):
        log_probs(**({**given, "sampler": "sde", "noise_level": 0.7} | changes))


def test_a_denoiser_of_another_dtype_is_refused_by_both_names_unless_autocast_casts() -> None:
    reported = environment(1.0)
    reported["replay"]["dtype"] = "bfloat16"
    with pytest.raises(ValueError, match="transformer computes in bfloat16, and the one given is in float32"):
        velocity(MODULES, [reported], torch.randn(1, 3), 0)
    with torch.autocast("cpu", torch.bfloat16):
        velocity(MODULES, [reported], torch.randn(1, 3), 0)


def test_an_adapter_of_the_server_s_denoiser_makes_no_wrong_ratios() -> None:
    def of(nickname: str, component: str = "transformer", strength: float = 0.8) -> dict[str, Any]:
        drawn = {"nickname": nickname, "component": component, "strength": strength, "mode": "merge"}
        return environment(1.0) | {"adapters": [drawn]}

    def replayed(reported: dict[str, Any], **more: Any) -> torch.Tensor:
        return log_probs(MODULES, [reported], [trajectory()], [0], "sde", 0.7, **more)

    with pytest.raises(
        ValueError, match=r"adapter 'style' \(merge, strength 0.8\) in transformer.*adapters=\['style'\]"
    ):
        replayed(of("style"))
    replayed(of("style"), adapters=["style"])
    replayed(of("style", strength=0.0))
    replayed(of("style", "text_encoder"))  # its part is in what the denoiser was given
    replayed(of("lora_merge:transformer"))


def test_the_reason_why_calls_cannot_be_replayed_is_reported() -> None:
    reported = environment(1.0) | {"replay": None}
    with pytest.raises(ValueError, match="arguments change between steps"):
        velocity(MODULES, [reported], torch.randn(1, 3), 0)
    with pytest.raises(ValueError, match="combines the denoiser's predictions"):
        velocity(MODULES, [reported | {"guidance": {"rule": None}}], torch.randn(1, 3), 0)
