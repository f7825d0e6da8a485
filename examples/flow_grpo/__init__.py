"""Reinforcement learning of a diffusion model that a server draws with: Flow-GRPO, small enough for two cores.

Trainer and server share the machine's cores, so threads of both give them up while they wait. OpenMP reads its settings
once, as torch is imported: they are made here, before that.
"""

import os

from safelight.server.child_process import child_environment

os.environ.update(child_environment())
