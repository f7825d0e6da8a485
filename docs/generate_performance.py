"""Draw the pictures of ``docs/performance.md`` and fill in its tables: ``python docs/generate_performance.py``.

A line ``<!-- results: NAME -->`` in the page is followed by the first table of ``benchmarks/results/NAME.md``, and a
line ``<!-- results: NAME#HEADING -->`` by the first one below that heading. The pictures in ``docs/pictures`` name the
results that they were drawn from by their digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "performance.md"
PICTURES = DOCS / "pictures"
RESULTS = DOCS.parent / "benchmarks" / "results"


_TABLE = re.compile(r"(<!-- results: ([a-z-]+)(?:#([a-z-]+))? -->\n)(?:\n?(?:\|.*\n)+)?")


def document() -> str:
    """The page's text, with the tables of the results."""
    return _TABLE.sub(lambda found: found[1] + "\n" + _table(found[2], found[3]), PAGE.read_text(encoding="utf-8"))


def _table(name: str, heading: str | None) -> str:
    """The first table of the results ``name``, below ``heading`` if there is one."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    if heading is not None:
        _, text = re.split(rf"(?im)^#+ {heading.replace('-', '[ -]')}$", text, maxsplit=1)
    found = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert found is not None, f"{name} has no table"
    return found[0]


def digest(name: str) -> str:
    """The digest of the results ``name``, which a picture drawn from them contains."""
    return hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()[:16]


def _draw_caching(axes: Any, found: dict[str, Any]) -> None:
    for rule in ("easycache", "teacache"):
        rows = [row for row in found["step_cache"]["rows"] if row["rule"] == rule]
        axes.plot([row["forwards_a_picture"] for row in rows], [row["mean_error"] for row in rows], "o", label=rule)
        for row in rows:
            axes.annotate(f" {row['threshold']}", (row["forwards_a_picture"], row["mean_error"]))
    steps = found["step_cache"]["steps"]
    axes.set(xlabel=f"steps of {steps} that are computed", ylabel="mean error of a pixel", ylim=(0, None))
    axes.legend()


def _draw_compiling(axes: Any, found: dict[str, Any]) -> None:
    plain = found["rows"]["diffusers"]["picture_cpu_s"]
    systems = [name for name in found["rows"] if name != "diffusers"]
    axes.barh(systems, [plain / found["rows"][name]["picture_cpu_s"] for name in systems])
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("pictures beside plain diffusers, by CPU time")


def _draw_peers(axes: Any, found: dict[str, Any]) -> None:
    clients = sorted({row["clients"] for row in found["rows"]})
    systems = list(dict.fromkeys(row["system"] for row in found["rows"]))
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        rates = {row["clients"]: row["pictures_per_s"] for row in found["rows"] if row["system"] == system}
        places = [place + (number - (len(systems) - 1) / 2) * width for place in range(len(clients))]
        axes.bar(places, [rates[count] for count in clients], width, label=system)
    axes.set_xticks(range(len(clients)), [f"{count} clients" if count > 1 else "1 client" for count in clients])
    axes.set_ylabel("pictures per second")
    axes.legend()


DRAWN: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "caching": _draw_caching,
    "compiling": _draw_compiling,
    "peers": _draw_peers,
}
"""Pictures, by the name of their results."""


def draw(name: str) -> None:
    """Draw the picture of the results ``name``."""
    import matplotlib  # the tables need no plots
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = name
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    DRAWN[name](figure.subplots(), json.loads((RESULTS / f"{name}.json").read_text()))
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None, "Description": digest(name)})


if __name__ == "__main__":
    for results in DRAWN:
        draw(results)
    PAGE.write_text(document(), encoding="utf-8")
