"""Pipelines: what a class of diffusers takes and makes, read from its signature, its components and its checkpoint."""
