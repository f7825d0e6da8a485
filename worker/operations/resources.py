"""The objects that the participants of one rank share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...protocol.tensor_sources import Noise, Source
from ..forward.batcher import Batcher
from ..forward.prompt_cache import is_text_encoder
from ..lora.rank_adapters import RankAdapters
from ..model.model import Model
from ..model.modules import modules
from ..parallel.ranks import Ranks
from ..weights.progress import OnProgress
from ..weights.snapshot.journal import Journal
from ..weights.transport.groups import ProcessGroups
from ..weights.transport.sources import RankContext, TensorSource, open_source
from ..weights.update.noise import noise
from ..weights.update.undo_log import UndoLog

PROMPT_CACHE = "prompt_embeddings"
"""The name in replies of the cache of text encoder outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """``global_rank`` and ``world_size`` count all ranks of all replicas; ``shared`` is the shared-memory directory.

    ``on_progress`` is called after each part of long work.
    """

    model: Model
    batcher: Batcher
    ranks: Ranks
    global_rank: int
    world_size: int
    shared: Path
    journal: Journal | None
    undo_log: UndoLog
    adapters: RankAdapters
    groups: ProcessGroups
    on_progress: OnProgress

    @property
    def replica(self) -> int:
        return self.global_rank // self.ranks.size

    def open(self, source: Source, *, is_primary: bool) -> TensorSource:
        """The tensors that ``source`` has for this rank. Raises ``InvalidRequest``, ``Unavailable`` or ``Rejected``."""
        if isinstance(source, Noise):
            return TensorSource(noise(source, self.model.layouts))
        device, ranks = self.model.device, self.ranks
        context = RankContext(ranks.rank, ranks.size, self.global_rank, self.world_size, device, is_primary)
        return open_source(source, self.groups, context, self.on_progress)

    def changed(self, components: Iterable[str]) -> list[str]:
        """Forget what was computed from the weights of ``components``; returns the names of the caches.

        Prompts stay unless a text encoder has changed, be it by a tensor that it shares with another component.
        """
        found = modules(self.model.pipeline)
        encoding = {
            id(tensor) for name, module in found.items() if is_text_encoder(name) for tensor in _tensors(module)
        }
        changed = {id(tensor) for name in components for tensor in _tensors(found[name])}
        return [] if encoding.isdisjoint(changed) else self.flush_caches()

    def flush_caches(self) -> list[str]:
        """Forget what was computed from any weights; returns the names of the caches."""
        self.batcher.forget_answers()
        return [PROMPT_CACHE]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
