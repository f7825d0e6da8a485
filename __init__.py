"""Safelight: a serving runtime for diffusion models that goes on serving while they are trained."""

__version__ = "0.1.0"
