"""Row division: ranks with the same weights each compute some rows of a denoiser's forward, and exchange the outputs.

The rows are those of all calls of a forward: several requests, the two calls of guidance, or the two halves of one call
that a pipeline makes for guidance. So the result is that of merged forwards, and nothing here knows of guidance.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from typing import Any

import torch

from ..parallel.mesh import Mesh
from ..parallel.ranks import Ranks
from ..pipelines.components import DENOISERS
from .batch import Forward
from .recovery import Agree
from .row_windows import NoRows, Rows, Window, have_equal_rows
from .runner import Counters
from .stages import DrawsRandomNumbers
from .timing import Timing

log = logging.getLogger(__name__)

Run = Callable[[Forward], list[Any]]

_DONE, _NO_MEMORY, _FAILED, _DRAWN, _NO_ROWS = range(5)
"""How a rank's part of a forward has ended; the highest number of all ranks counts."""

_WHY_WHOLE = {
    _FAILED: "some of its rows fail without the others",
    _DRAWN: "it draws random numbers",
    _NO_ROWS: "its output does not consist of rows of one shape",
}


class Undivided(Exception):
    """The part of a rank has ended otherwise than well."""

    def __init__(self, ended: int) -> None:
        super().__init__(ended)
        self.ended = ended


class RowDivision:
    """Divides forwards among ``ranks``; ``agree`` is the batcher's, and all ranks of the replica call it together.

    ``timing`` measures the divided forwards, with the exchange of their outputs.
    """

    name = "rows on several ranks"

    def __init__(self, ranks: Ranks, agree: Agree, timing: Timing | None = None) -> None:
        self._ranks = ranks
        self._agree = agree
        self._timing = timing
        self._whole: dict[str, str] = {}
        """The reason why every rank computes all rows, by name of the calls; equal on all ranks."""

    @classmethod
    def of(cls, mesh: Mesh, timing: Timing | None = None) -> RowDivision | None:
        """The division among the ranks of the axis ``cfg``; ``None`` if there is one."""
        ranks = mesh.axis("cfg")
        return cls(ranks, mesh.agree, timing) if ranks.size > 1 else None

    def answers(self, forward: Forward, run: Run, counters: Counters) -> list[Any]:
        """The answers of the forward's calls. ``run`` computes a forward on this rank, and raises on all ranks or none.

        If the part of any rank fails, every rank runs the whole ``forward``.
        """
        if not self._may_divide(forward):
            return run(forward)
        try:
            if self._timing is None:
                answers = self._divided(forward, run)
            else:
                answers = self._timing(forward, lambda: self._divided(forward, run))
        except Undivided as undivided:
            ended = undivided.ended
        else:
            counters.divided += 1
            return answers
        self._agree(f"a part of {len(forward.calls)} calls to {forward.name} has ended with {ended}")
        answers = run(forward)
        if ended in _WHY_WHOLE:
            self._whole[forward.name] = _WHY_WHOLE[ended]
            log.warning("every rank computes all rows of %s from now on: %s", forward.name, _WHY_WHOLE[ended])
        return answers

    def _divided(self, forward: Forward, run: Run) -> list[Any]:
        """Compute this rank's rows, and exchange them. Raises ``Undivided`` on every rank if that fails on one."""
        window = Window(sum(part.rows for part in forward.parts), self._ranks)
        rows, ended = self._attempt(window.cut(forward), run)
        ended = self._worst(rows, ended)
        if ended != _DONE:
            raise Undivided(ended)
        assert rows is not None
        return window.whole(rows).answers(forward.parts)

    def _may_divide(self, forward: Forward) -> bool:
        if forward.probe or forward.component not in DENOISERS or forward.name in self._whole:
            return False
        if any(pending.batchable is None for pending in forward.calls):
            return False
        return sum(part.rows for part in forward.parts) > 1 and have_equal_rows(forward.parts)

    def _attempt(self, own: Forward, run: Run) -> tuple[Rows | None, int]:
        """The outputs of this rank's rows, and how they have ended."""
        try:
            return Rows.of(own.parts, run(own)), _DONE
        except torch.AcceleratorError:  # the device no longer works in this process
            raise
        except torch.OutOfMemoryError:
            return None, _NO_MEMORY
        except DrawsRandomNumbers:
            return None, _DRAWN
        except NoRows:
            return None, _NO_ROWS
        except Exception:  # run whole, the forward shows on every rank whether it fails
            log.info("a part of a forward of %s failed", own.name, exc_info=True)
            return None, _FAILED

    def _worst(self, rows: Rows | None, ended: int) -> int:
        """How the ranks' parts have ended together; their outputs must have the same form to be exchanged."""
        form = 0 if rows is None else zlib.crc32(rows.form.encode())
        everywhere = torch.stack(self._ranks.all_gather(torch.tensor([ended, form])))
        worst = int(everywhere[:, 0].max())
        return worst if worst != _DONE or bool((everywhere[:, 1] == form).all()) else _NO_ROWS
