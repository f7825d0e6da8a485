"""The names that workers use of libraries beyond what these document."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType

import pytest
from diffusers import FluxTransformer2DModel

from safelight.tests.tiny import FAMILIES
from safelight.worker.internals import diffusers, dynamo, torch, transformers
from safelight.worker.internals.lookup import MissingInternal, lookup
from safelight.worker.parallel import families as family_files
from safelight.worker.parallel.families import families, family_of


@pytest.mark.parametrize(
    ("library", "name"), [(one, name) for one in (diffusers, dynamo, transformers) for name in one.NAMES]
)
def test_a_name_is_there(library: ModuleType, name: str) -> None:
    getattr(library, name)


@pytest.mark.parametrize("library", [diffusers, transformers, torch])
def test_what_was_checked_is_what_is_installed(library: ModuleType) -> None:
    name = library.__name__.rpartition(".")[2]
    assert importlib.metadata.version(name).partition("+")[0] == library.CHECKED


def test_a_missing_name_is_reported_with_the_releases() -> None:
    find = lookup("diffusers", "0.1", {"gone": "diffusers:FluxTransformer2DModel._gone"})
    with pytest.raises(MissingInternal, match=r"has no diffusers\.FluxTransformer2DModel\._gone, .* diffusers 0\.1$"):
        find("gone")


def test_a_release_without_a_plan_serves_its_models_whole_and_the_others_as_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(FluxTransformer2DModel, "_tp_plan")
    monkeypatch.delitem(sys.modules, f"{family_files.__name__}.flux", raising=False)
    caches = (families, diffusers.__getattr__)
    for cached in caches:
        cached.cache_clear()
    try:
        assert family_of(FluxTransformer2DModel) is None
        assert "the tensor-parallel plan of flux cannot be used: diffusers" in caplog.text
        assert family_of(type(FAMILIES["sd3"].build().transformer)) is not None
    finally:
        for cached in caches:
            cached.cache_clear()
