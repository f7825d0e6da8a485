"""Clips of the shapes world: one shape that moves, its caption, a renderer, a judge, and the training of a model."""

from .captions import caption
from .clip import Clip, every_clip, sample_clips
from .judge import ClipVerdict, judge_clip
from .render import render_clips

__all__ = ["Clip", "ClipVerdict", "caption", "every_clip", "judge_clip", "render_clips", "sample_clips"]
