"""Imported once by the server that children are forked from, so that they find the modules of every pipeline there."""

from __future__ import annotations

from . import child
from .catalogue import exported

PIPELINES = exported()

__all__ = ["PIPELINES", "child"]
