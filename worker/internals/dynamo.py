"""Undocumented names of torch's compiler that workers use; looked up late, because its import takes a second."""

from __future__ import annotations

from .lookup import lookup

CHECKED = "2.13.0"

NAMES = {
    "run": "torch._dynamo:run",
    "maybe_mark_dynamic": "torch._dynamo:maybe_mark_dynamic",
    "config": "torch._dynamo:config",
    "counters": "torch._dynamo.utils:counters",
    "RecompileLimitHit": "torch._dynamo.exc:FailOnRecompileLimitHit",
}

__getattr__ = lookup("torch", CHECKED, NAMES)
