"""The device of these tests: a real GPU, a played one, or the CPU (``TEST_DEVICE=cuda``, ``played`` or ``cpu``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest
import torch

from safelight.tests import played

KIND = os.environ["TEST_DEVICE"]
PLAYED = KIND == "played"
TYPE = "cpu" if KIND == "cpu" else "cuda"
"""The type for torch, and for ``--device``."""

DEVICES = 4
"""The number of played devices."""

played_only = pytest.mark.skipif(not PLAYED, reason="it reads the record of a played device")
on_devices = pytest.mark.skipif(TYPE != "cuda", reason="it is about the memory or the order of a CUDA device")


def device(index: int = 0) -> torch.device:
    """Device ``index``, or the last one if there are fewer."""
    if TYPE == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", min(index, torch.cuda.device_count() - 1))


def of_programs(**variables: str) -> dict[str, str]:
    """Environment variables with which servers that tests start have the same device."""
    if not PLAYED:
        return variables
    site = Path(cast(str, played.__file__)).parent / "site"
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "PLAYED_DEVICES": str(DEVICES), **variables}
