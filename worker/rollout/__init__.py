"""Rollouts: generations that record their sampling for a trainer."""
