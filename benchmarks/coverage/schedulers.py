"""Schedulers by the class that a pipeline asks for."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

Arguments = dict[str, Any]

NOISE: Arguments = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
"""Stable Diffusion's."""

FORMS: dict[str, Arguments] = {
    "CogVideoXDDIMScheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "DDIMInverseScheduler": NOISE,
    "DDIMScheduler": NOISE | {"clip_sample": False, "set_alpha_to_one": False},
    "DDPMScheduler": {"beta_schedule": "linear"},
    "DPMSolverMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    "EulerDiscreteScheduler": NOISE | {"timestep_spacing": "leading"},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "LCMScheduler": NOISE | {"set_alpha_to_one": False},
    "UniPCMultistepScheduler": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
}
"""Arguments that differ from the class's own defaults."""

FOR_ANY = "DDIMScheduler"
"""For pipelines that take any of the older schedulers."""


def make_scheduler(name: str, arguments: Arguments) -> SchedulerMixin:
    """A scheduler of class ``name``; ``arguments`` go before those of its form."""
    return getattr(diffusers, name)(**(FORMS.get(name, {}) | arguments))
