"""Graphs of a model's components: a stage around forwards, in which their repeated blocks are replayed."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...protocol.errors import StartFailed
from ...protocol.replicas import GraphStats
from ..forward.adapters import Adapters
from ..forward.batch import Forward
from ..internals.blocks import NoBlocks, repeated_blocks
from .block import GraphedBlock
from .component import GraphedComponent
from .library import ForwardPass, Library
from .recorder import Recorder

log = logging.getLogger(__name__)

RECORD_AFTER = 8
"""Forwards of one shape before it is recorded, which costs as much as about four of them."""


class Graphs:
    """Replays the blocks of ``components``; the rank has ``adapters``."""

    name = "graphs"

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        recorder: Recorder,
        adapters: Adapters | None,
        *,
        max_bytes: int,
        record_after: int = RECORD_AFTER,
        retries: bool = True,
    ) -> None:
        """With ``retries``, a forward that ran out of memory is run again without graphs."""
        self._library = Library(recorder, max_bytes, record_after)
        self._adapters = adapters
        self._retries = retries
        self._components: dict[str, GraphedComponent] = {}
        self.without_blocks: dict[str, str] = {}
        """Why components have no graphs at all."""
        by_module: dict[nn.Module, str] = {}  # a module may be several components
        for name, module in components.items():
            if (other := by_module.setdefault(module, name)) != name:
                if other in self._components:
                    self._components[name] = self._components[other]
            else:
                self._add(name, module)

    def _add(self, name: str, module: nn.Module) -> None:
        try:
            blocks = {path: block for group in repeated_blocks(module) for path, block in group.modules.items()}
        except NoBlocks as reason:
            log.info("%s has no CUDA graphs: %s", name, reason)
            self.without_blocks[name] = str(reason).partition(":")[0]
            return
        shared = [path for path, block in blocks.items() if isinstance(block, GraphedBlock)]
        if shared:
            self.without_blocks[name] = f"it shares {shared[0]} with another component"
            return
        self._components[name] = GraphedComponent(name, blocks, self._library)

    def __call__(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]:
        try:
            return self._answers(forward, proceed)
        except torch.OutOfMemoryError as error:
            if not self._library.drop_all() or not self._retries:
                raise
            traceback.clear_frames(error.__traceback__)
        log.warning("graphs make way: a forward of %s ran out of memory", forward.name)
        torch.cuda.empty_cache()
        return self._answers(forward, proceed)

    def _answers(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]:
        component = self._components.get(forward.component.partition(".")[0])
        if component is None:
            return proceed()
        plain, reason = _needs_plain(forward), _why_eager(forward)
        if plain or reason is not None:
            with component.during(None, None if plain else reason):
                return proceed()
        adapters = None if self._adapters is None else self._adapters.memory(forward.component)
        forward_pass = ForwardPass(adapters)
        with component.during(forward_pass):
            answers = proceed()
        return [_own(answer, forward_pass.addresses) for answer in answers]

    def forget(self) -> None:
        """Free the memory of all recordings; the next forwards record them again."""
        self._library.forget()

    def revalidate(self) -> None:
        """Drop the recordings of components whose weights lie elsewhere now."""
        for component in self._components.values():
            component.revalidate()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within this context, every shape is recorded at once."""
        self._library.records_all = True
        try:
            yield
        finally:
            self._library.records_all = False

    def enforce(self) -> None:
        """From now on, a block that runs eagerly raises ``GraphMiss``. Raises ``StartFailed`` if one did so before."""
        if reasons := self.eager_reasons():
            raise StartFailed(f"--enforce-piecewise-cuda-graph: {'; '.join(reasons)}.")
        if self._library.counters.evictions:
            raise StartFailed(
                "--enforce-piecewise-cuda-graph: the sizes of the warm-up need more than --cuda-graph-mb."
            )
        if not self._library.counters.captures:
            raise StartFailed("--enforce-piecewise-cuda-graph: the warm-up called no block.")
        self._library.is_closed = True

    def eager_reasons(self) -> list[str]:
        """Why blocks ran eagerly, one sentence for each reason."""
        without = [f"{name}: {reason}" for name, reason in self.without_blocks.items()]
        components = dict.fromkeys(self._components.values())
        return [*without, *(text for component in components for text in component.eager_reasons())]

    def stats(self) -> GraphStats:
        counters = self._library.counters
        return GraphStats(
            state="on",
            captures=counters.captures,
            replays=counters.replays,
            misses=counters.misses,
            evictions=counters.evictions,
            shapes=len(self._library),
            mb=round(self._library.nbytes / 1e6, 1),
            eager=self.eager_reasons(),
        )


def _needs_plain(forward: Forward) -> bool:
    """True for a probe or a deterministic request; neither counts as a miss."""
    return forward.probe or any(pending.coroutine.plain for pending in forward.calls)


def _why_eager(forward: Forward) -> str | None:
    """Why a replay might differ from the call; ``None`` if it does not."""
    if forward.state is not None or torch.is_grad_enabled():
        return "its pipeline calls it with other settings of torch"
    if any(pending.call.around is not None for pending in forward.calls):
        return "its pipeline changes the component for the call"
    if any(pending.coroutine.exclusive for pending in forward.calls):
        return "requests of its pipeline run one after the other, as it may change anything"
    return None


def _own(answer: Any, addresses: set[int]) -> Any:
    """``answer``, with a copy of each tensor in memory that later replays overwrite."""
    return pytree.tree_map_only(torch.Tensor, lambda one: one.clone() if _address(one) in addresses else one, answer)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
