"""Reinforcement learning of the model that a server serves: Flow-GRPO, small enough for two cores.

Trainer and server share the machine's cores, so the trainer's threads yield while they wait. OpenMP reads its settings
once, when torch is imported, so this module sets them before that.
"""

import os

from safelight.server.child_process import child_environment

SPIN_COUNT = 2000
"""Rounds for which an OpenMP thread waits for work before it sleeps; its default is 300,000, milliseconds.

The server's workers adapt to the load of the machine, and a trainer does not. Of the numbers in docs/decisions/0006,
this one costs little on idle cores and leaves busy ones to the server.
"""

os.environ.update(child_environment())
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
