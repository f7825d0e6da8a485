"""Safelight: a serving runtime for diffusion models that keeps serving while they are trained."""

from .torchvision_import import allow_without_operators

__version__ = "0.1.0"

allow_without_operators()  # in every process, before it imports a pipeline
