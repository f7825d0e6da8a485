"""File formats: checkpoints, safetensors files and their digests, and the names of embedded models."""
