"""Rollouts: generations that record how they went, for those who train on them."""
