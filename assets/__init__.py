"""The embedded models, as ordinary diffusers checkpoints."""
