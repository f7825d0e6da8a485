"""The shapes world: scenes, their captions, a renderer, a judge that reads pictures, and the training of a model.

It imports nothing else of Safelight's; `shapes.train` makes the checkpoint in `assets/shapes`.
"""

from .captions import caption, describe
from .judge import Verdict, judge
from .render import render
from .scene import Scene, sample_scenes

__all__ = ["Scene", "Verdict", "caption", "describe", "judge", "render", "sample_scenes"]
