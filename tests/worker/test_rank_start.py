"""A rank waits for the others as long as a start may take, until it serves."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.protocol.child_config import ChildConfig
from safelight.protocol.config import Config
from safelight.protocol.self_test import SelfTestResult
from safelight.tests.tiny import save
from safelight.worker.parallel.mesh import Mesh
from safelight.worker.rank.engine import Engine
from safelight.worker.rank.rank_process import RankProcess


def test_a_rank_that_compiles_for_longer_than_a_stall_does_not_end_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a warm-up the ranks wait for the slowest compiler."""
    happened: list[str | float] = []
    untested = SelfTestResult(mode="merged", unmergeable={}, text=None, image=None, no_image="")
    monkeypatch.setattr(RankProcess, "_test", lambda *_: untested)
    monkeypatch.setattr(RankProcess, "_lead", lambda *_: happened.append("serves"))
    monkeypatch.setattr(Engine, "warm_up", lambda *_: happened.append("warm-up"))
    monkeypatch.setattr(Mesh, "set_timeout", lambda _, timeout_s: happened.append(timeout_s))
    config = Config(model=str(save("flux", tmp_path)), device="cpu", threads=1, stall_timeout_s=5.0)
    process = RankProcess(ChildConfig(config=config, directory=str(tmp_path), replica=0))
    assert process._serve(*process._load()) == 0
    assert happened == ["warm-up", 5.0, "serves"]
