"""The resources of a batcher's forwards: caches, adapters, clocks, and the other state that stages need."""

from __future__ import annotations

from dataclasses import dataclass

from .activity import Activity
from .adapters import Adapters
from .at_rest import AtRest
from .compiled import Compiled
from .graphs import Graphs
from .offload import Offload
from .prompt_cache import PromptCache
from .runner import Division
from .tiling import Tiling
from .timing import Timing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardResources:
    """Each one has a stage; ``division`` stands around all stages. A resource that is ``None`` has none.

    ``plain_attention`` is the attention backend of deterministic requests, if the others have another.
    """

    cache: PromptCache | None = None
    adapters: Adapters | None = None
    timing: Timing | None = None
    at_rest: AtRest | None = None
    activity: Activity | None = None
    plain_attention: str | None = None
    tiling: Tiling | None = None
    graphs: Graphs | None = None
    compiled: Compiled | None = None
    offload: Offload | None = None
    division: Division | None = None
