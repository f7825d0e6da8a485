"""Reinforcement learning of the model that a server serves: Flow-GRPO, small enough for two cores.

Trainer and server share the machine's cores, so the threads of both yield while they wait. OpenMP reads its settings
once, when torch is imported, so this module sets them before that.
"""

import os

from safelight.server.child_process import child_environment

os.environ.update(child_environment())
