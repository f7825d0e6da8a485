"""Rollouts: their mathematics, their recording, and what a trainer makes of a live server's replies."""
