"""A rollout's environment has the denoiser's arguments by their own names, complete for each branch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safelight.rollout.replay import velocity
from safelight.worker.crossing.call import Call
from safelight.worker.rollout.environment import Environment


class Denoiser(torch.nn.Module):
    """Guided by its condition; the rest is looked at alone."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
        img_shapes: Any = None,
        return_dict: bool = True,
    ) -> Any:
        assert image_rotary_emb is not None
        assert image_rotary_emb.shape == (1, 5)
        return (hidden_states * encoder_hidden_states.mean(1, keepdim=True) + timestep[:, None],)


def environment_of(*, joined: bool, from_images: bool) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The environment of a step with guidance, its state and its velocity."""
    denoiser, x = Denoiser(), torch.randn(1, 3)
    environment = Environment([4.0], from_images=from_images)
    rows = 2 if joined else 1
    shared = {"image_rotary_emb": torch.zeros(1, 5), "img_shapes": [(1, 4, 4)], "return_dict": False}
    given = {"timestep": torch.full((rows,), 0.5), "encoder_hidden_states_image": torch.ones(rows, 2), **shared}
    positive, negative = torch.full((1, 2), 2.0), torch.full((1, 2), 1.0)
    conditions = [torch.cat([negative, positive])] if joined else [positive, negative]
    answers = []
    for condition in conditions:
        arguments = {"hidden_states": x.repeat(rows, 1), "encoder_hidden_states": condition, **given}
        answer = denoiser(**arguments)
        environment.saw(Call("transformer", "__call__", denoiser, (), arguments), answer)
        answers += answer[0].split(1)
    first, last = answers if joined else answers[::-1]
    v = first + 4.0 * (last - first)
    environment.stepped(v, x)
    return environment.reported(), x, v


@pytest.mark.parametrize("joined", [False, True])
def test_what_branches_share_is_in_both_and_images_are_apart_and_all_of_it_makes_the_velocity_again(
    joined: bool,
) -> None:
    found, x, v = environment_of(joined=joined, from_images=True)
    assert found["image_kwargs"].keys() == {"encoder_hidden_states_image"}
    for branch in ("pos_cond_kwargs", "neg_cond_kwargs"):
        assert found[branch].keys() == {"encoder_hidden_states", "image_rotary_emb", "img_shapes"}
    assert found["pos_cond_kwargs"]["encoder_hidden_states"].mean() == 2
    assert torch.equal(velocity({"transformer": Denoiser()}, [found], x, 0), v)


def test_without_input_images_no_argument_is_marked_as_derived_from_one() -> None:
    found, *_ = environment_of(joined=False, from_images=False)
    assert found["image_kwargs"] == {}
    assert "encoder_hidden_states_image" in found["neg_cond_kwargs"]
