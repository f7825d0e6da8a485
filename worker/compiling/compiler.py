"""The compiler's thread: it compiles copies of blocks, and verifies them, while the replica serves."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from ...protocol.compiling import CompiledComponentStats
from ..internals import dynamo
from ..internals.blocks import NoBlocks
from ..parallel import operators
from ..parallel.device import use_device
from ..parallel.ranks import Ranks
from .admission import Judge, NotAdmitted, admit
from .agreement import AGAIN, Decision, agreement
from .component import CompiledComponent, Job, Ticket
from .program import Backend, Graph, LimitMet, Program, SettingsChanged

log = logging.getLogger(__name__)


_CPU = torch.device("cpu")

_DIRECTORY = "TORCHINDUCTOR_CACHE_DIR"

MAX_WAITING = 8
"""Jobs that may wait, each with a copy of a block. A call that finds no place comes again with the next step."""


FORWARDS = 8
"""Ranks that share layers compare what they have compiled before each forward of this number."""


class Compiler:
    """Compiles the blocks of ``components`` when calls need it. Those ``without_blocks`` run eagerly.

    The thread works on copies alone. So it neither sees nor disturbs updates of weights, sleep, adapters and requests.
    In it, collectives are played: other ranks are elsewhere. The ranks along the ``axes`` share the components' layers;
    all of them call every method together.

    The thread ends when it has nothing to do. OpenMP's threads of all teams count as running for as long as the thread
    that started them lives, and while there are more than cores, the model's would sleep between operators.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        judge: Judge,
        backend: Backend = "inductor",
        axes: Sequence[Ranks] = (),
    ) -> None:
        use_cache_directory()
        self._judge = judge
        self._backend = backend
        self._programs: dict[type[nn.Module], Program] = {}
        self._components: dict[str, CompiledComponent] = {}
        self.without_blocks: dict[str, str] = {}
        """The reasons, by component."""
        self._jobs = deque[Job]()
        self._agree = agreement(axes)
        self._forwards = 0
        self._open: dict[Ticket, Decision | None] = {}  # until it is settled, with the decision once the job has ended
        self._made: dict[Ticket, Graph] = {}  # for open tickets with a decision that admits
        self._threads = torch.get_num_threads()
        self._device = next((p.device for module in components.values() for p in module.parameters()), _CPU)
        self._idle = threading.Condition()  # of the open tickets, the jobs and the thread
        self._runs = False
        for name, module in components.items():
            self._add(name, module)

    def active(self, component: str) -> AbstractContextManager[None]:
        """Within this context, the component's blocks run their graphs where they have them."""
        found = self._components.get(component)
        if found is None:
            return nullcontext()
        self._forwards += 1
        if self._agree is not None and self._forwards % FORWARDS == 0:
            self._settle()
        return found.active()

    def stats(self) -> dict[str, CompiledComponentStats]:
        without = {
            name: CompiledComponentStats(state="eager", reason=reason) for name, reason in self.without_blocks.items()
        }
        return without | {name: component.stats() for name, component in self._components.items()}

    def program(self, cls: type[nn.Module]) -> Program:
        if cls not in self._programs:
            self._programs[cls] = Program(cls, self._backend)
        return self._programs[cls]

    def offer(self, ticket: Ticket, make: Callable[[], Job]) -> None:
        with self._idle:
            if ticket in self._open or len(self._open) == MAX_WAITING:
                return
            self._open[ticket] = None
        try:
            job = make()
        except Exception as error:  # there is no memory for a copy, or an argument has none: the request goes on
            log.warning("the call of a block of %s cannot be copied", ticket[0], exc_info=True)
            reason = f"the arguments of {ticket[1].__name__} cannot be copied ({type(error).__name__})"
            self._end(ticket, Decision(reason=reason, component=ticket[0]))
        else:
            self._enqueue(job)

    def wait(self) -> None:
        """Return when nothing is left to compile."""
        with self._idle:
            self._idle.wait_for(lambda: None not in self._open.values())
        if self._agree is not None:
            self._settle()

    def close(self) -> None:
        """Drop the jobs that wait; the current one ends in its own time."""
        with self._idle:
            self._jobs.clear()

    def _add(self, name: str, module: nn.Module) -> None:
        try:
            self._components[name] = CompiledComponent(name, module, self)
        except NoBlocks as reason:
            log.warning("%s is not compiled: %s", name, reason)
            self.without_blocks[name] = str(reason)

    def _enqueue(self, job: Job) -> None:
        with self._idle:
            self._jobs.append(job)
            starts, self._runs = not self._runs, True
        if starts:
            try:
                threading.Thread(target=self._run, name="compiler", daemon=True).start()
            except RuntimeError as error:  # the system allows no more threads
                self._give_up(error)

    def _next(self) -> Job | None:
        """``None`` tells the thread to end; the next job starts another one."""
        with self._idle:
            self._runs = bool(self._jobs)
            return self._jobs.popleft() if self._jobs else None

    def _end(self, ticket: Ticket, decision: Decision) -> None:
        with self._idle:
            self._open[ticket] = decision
            if self._agree is None:
                self._settle()
            self._idle.notify_all()

    def _settle(self) -> None:
        """Apply the decisions that all ranks share."""
        with self._idle:
            decisions = {_name(ticket): decision for ticket, decision in self._open.items()}
        if self._agree is not None:
            decisions = dict(self._agree(decisions))
        with self._idle:
            for ticket in list(self._open):
                if (decision := decisions.get(_name(ticket))) is not None:
                    del self._open[ticket]
                    self._apply(ticket, decision)
            for decision in decisions.values():  # also of jobs that this rank lacks
                if decision is not None and decision.reason is not None:
                    log.warning("%s is not compiled: %s", decision.component, decision.reason)
                    self._components[decision.component].refuse(decision.reason)

    def _apply(self, ticket: Ticket, decision: Decision) -> None:
        name, cls, key = ticket
        graph = self._made.pop(ticket, None)
        if decision.admitted:
            assert graph is not None
            self._components[name].admit(cls, key, graph)

    def _run(self) -> None:
        try:
            self._run_jobs()
        except Exception as error:  # of torch's private parts: requests go on, and none may wait for this thread
            log.exception("the compiler's thread has failed")
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Refuse what is open, as nothing else would decide it."""
        with self._idle:
            self._runs = False
            self._jobs.clear()
            for ticket in [ticket for ticket, decision in self._open.items() if decision is None]:
                reason = f"the compiler's thread has failed ({_described(error)})"
                self._end(ticket, Decision(reason=reason, component=ticket[0]))

    def _run_jobs(self) -> None:
        use_device(self._device)
        # graphs hold for these settings of the thread that runs them, so that both threads need the same
        torch.set_num_threads(self._threads)
        torch.set_grad_enabled(False)
        dynamo.restore_nothing()
        # in this thread alone; to measure whether padding pays, inductor would draw from the GPU's global generator
        with dynamo.inductor_config.patch(shape_padding=False), operators.played():
            while (job := self._next()) is not None:
                self._end(job.ticket, self._compiled(job) if job.component.reason is None else AGAIN)

    def _compiled(self, job: Job) -> Decision:
        began, graphs = time.monotonic(), job.program.graphs
        decision = self._decision(job)
        seconds = time.monotonic() - began
        job.component.seconds += seconds
        if job.program.graphs > graphs:
            log.info("compiled %s of %s in %.1f s", job.program.cls.__name__, job.component.name, seconds)
        return decision

    def _decision(self, job: Job) -> Decision:
        component, cls = job.component, job.program.cls.__name__
        try:
            graph = job.program.compile(job.block, job.arguments)
            admit(job.program, graph, job.block, job.arguments, self._judge)
        except LimitMet as limit:
            component.leave_eager(job.program.cls, job.key)
            log.warning("%s of %s: %s, the limit; further kinds of calls run eagerly", cls, component.name, limit)
        except SettingsChanged:  # a later call comes again
            log.info("%s of %s: torch's settings changed while its graph was made", cls, component.name)
        except NotAdmitted as reason:
            return Decision(reason=str(reason), component=component.name)
        except Exception as error:  # the compiler raises any class; the component serves without it
            log.warning("%s is not compiled", component.name, exc_info=True)
            return Decision(reason=f"{cls} does not compile ({_described(error)})", component=component.name)
        else:
            self._made[job.ticket] = graph
            return Decision(admitted=True)
        return AGAIN


def _name(ticket: Ticket) -> str:
    """Equal for equal tickets of all ranks."""
    component, cls, key = ticket
    return hashlib.sha256(f"{component} {cls.__qualname__} {key!r}".encode()).hexdigest()


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def use_cache_directory() -> None:
    """Have inductor keep what it compiles below the user's cache, so that the next start finds it.

    A directory that the operator has chosen stays. Once asked, torch writes its default, below the temporary directory,
    into the environment, which no one has chosen.
    """
    if os.environ.get(_DIRECTORY) in (None, os.path.abspath(dynamo.default_cache_dir())):
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        os.environ[_DIRECTORY] = str(Path(base).expanduser() / "safelight" / "inductor")
