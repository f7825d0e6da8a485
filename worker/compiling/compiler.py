"""The compiler's thread: it compiles copies of blocks, and judges the result, while the replica serves."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import nn

from ...protocol.compiling import CompiledComponentStats
from ..internals import dynamo
from ..internals.blocks import NoBlocks
from .admission import Judge, NotAdmitted, admit
from .component import CompiledComponent, Job, Ticket
from .program import LIMIT, Backend, LimitMet, Program, SettingsChanged

log = logging.getLogger(__name__)


MAX_WAITING = 8
"""Jobs that may wait, each with a copy of a block. A call that finds no place comes again with the next step."""


class Compiler:
    """Compiles the blocks of ``components`` when calls need it. Components without blocks run eagerly.

    The thread works on copies alone. So it neither sees nor disturbs updates of weights, sleep, adapters and requests.
    """

    def __init__(self, components: Mapping[str, nn.Module], judge: Judge, backend: Backend = "inductor") -> None:
        use_cache_directory()
        self._judge = judge
        self._backend = backend
        self._programs: dict[type[nn.Module], Program] = {}
        self._components: dict[str, CompiledComponent] = {}
        self._without: dict[str, CompiledComponentStats] = {}
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting: set[Ticket] = set()  # of the running job, too
        self._threads = torch.get_num_threads()
        self._idle = threading.Condition()
        for name, module in components.items():
            self._add(name, module)
        self._thread = threading.Thread(target=self._run, name="compiler", daemon=True)
        self._thread.start()

    def active(self, component: str) -> AbstractContextManager[None]:
        """Within this context, the component's blocks run their graphs where they have them."""
        found = self._components.get(component)
        return nullcontext() if found is None else found.active()

    def stats(self) -> dict[str, CompiledComponentStats]:
        return self._without | {name: component.stats() for name, component in self._components.items()}

    def program(self, cls: type[nn.Module]) -> Program:
        if cls not in self._programs:
            self._programs[cls] = Program(cls, self._backend)
        return self._programs[cls]

    def offer(self, ticket: Ticket, make: Callable[[], Job]) -> None:
        with self._idle:
            if ticket in self._waiting or len(self._waiting) == MAX_WAITING:
                return
            self._waiting.add(ticket)
        try:
            job = make()
        except Exception:
            self._end(ticket)
            raise
        self._jobs.put(job)

    def _end(self, ticket: Ticket) -> None:
        with self._idle:
            self._waiting.discard(ticket)
            self._idle.notify_all()

    def wait(self) -> None:
        """Return when nothing is left to compile."""
        with self._idle:
            self._idle.wait_for(lambda: not self._waiting)

    def close(self) -> None:
        """End the thread after the current job, without waiting for it."""
        self._jobs.put(None)

    def _add(self, name: str, module: nn.Module) -> None:
        try:
            self._components[name] = CompiledComponent(name, module, self)
        except NoBlocks as reason:
            log.warning("%s is not compiled: %s", name, reason)
            self._without[name] = CompiledComponentStats(state="eager", reason=str(reason))

    def _run(self) -> None:
        # graphs hold for these settings of the thread that runs them, so that both threads need the same
        torch.set_num_threads(self._threads)
        torch.set_grad_enabled(False)
        dynamo.restore_nothing()
        # in this thread alone; to measure whether padding pays, inductor would draw from the GPU's global generator
        with dynamo.config.patch(recompile_limit=LIMIT), dynamo.inductor_config.patch(shape_padding=False):
            while (job := self._jobs.get()) is not None:
                if job.component.reason is None:
                    self._compile(job)
                self._end(job.ticket)

    def _compile(self, job: Job) -> None:
        component, cls, began = job.component, job.program.cls.__name__, time.monotonic()
        graphs = job.program.graphs
        try:
            job.program.compile(job.block, job.arguments)
            admit(job.program, job.block, job.arguments, self._judge)
        except LimitMet as limit:
            log.warning("%s of %s: %s, dynamo's limit; further kinds of calls run eagerly", cls, component.name, limit)
        except SettingsChanged:  # a later call comes again
            log.info("%s of %s: torch's settings changed while its graph was made", cls, component.name)
        except NotAdmitted as reason:
            log.warning("%s is not compiled: %s", component.name, reason)
            component.refuse(str(reason))
        except Exception as error:  # the compiler raises any class; the component serves without it
            log.warning("%s is not compiled", component.name, exc_info=True)
            component.refuse(f"{cls} does not compile ({_described(error)})")
        else:
            component.admit(job.program, job.key)
        component.seconds += time.monotonic() - began
        if job.program.graphs > graphs:
            log.info("compiled %s of %s in %.1f s", cls, component.name, time.monotonic() - began)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def use_cache_directory() -> None:
    """Have inductor keep what it compiles below the user's cache, so that the next start finds it."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(base).expanduser() / "safelight" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory))
