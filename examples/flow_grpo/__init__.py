"""Reinforcement learning of the model that a server serves: Flow-GRPO, small enough for two cores.

Trainer and server share the machine's cores, so their threads yield while they wait. OpenMP reads its settings
once, when torch is imported, so this module sets them before that.
"""

import os

from safelight.server.child_process import child_environment

os.environ.update(child_environment())
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
